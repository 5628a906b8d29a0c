"""Two real processes, started by Accelerate's launcher, against one: the same numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scenarios

from hub_mpq.errors import InvalidArgument
from hub_mpq.train import Finetune, fit

LAUNCH = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
LAUNCH += ["--dynamo_backend", "no", "--main_process_port", "0"]


def launch(*args, **env):
    command = [sys.executable, "-m", "accelerate.commands.launch", *LAUNCH, *map(str, args)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **env}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def folder(once):
    def make(folder):
        done = launch(Path(scenarios.__file__), folder)
        (folder / "error").write_text("" if done.returncode == 0 else done.stderr[-4000:] or "failed")

    return once("two", make)


@pytest.fixture(scope="module")
def two(folder):
    """Results of both processes."""
    assert (folder / "error").read_text() == ""
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Results of the scenarios that compare, in this process."""
    folder = tmp_path_factory.mktemp("one")
    return {name: scenarios.SCENARIOS[name](folder) for name in ("gradients", "indicators", "measured", "validated")}


def test_a_thread_that_frees_a_tensor_at_the_end_does_not_abort_the_process():
    done = launch(Path(scenarios.__file__).with_name("ends.py"))
    assert done.returncode == 0, done.stderr[-2000:]


def test_there_are_two(two):
    assert [result["device"] for result in two] == ["2 processes, device cpu, gloo"] * 2


@pytest.mark.parametrize("count", [str(count) for count in scenarios.COUNTS])
def test_two_halves_of_a_batch_give_the_gradients_of_the_whole(one, two, count):
    """Also in the last step, of 12 samples (8 and 4) and of 4 (4 and none)."""
    alone, both = one["gradients"][count], [result["gradients"][count] for result in two]
    assert both[0]["grads"] == both[1]["grads"]
    assert len(alone["grads"]) == len(both[0]["grads"]) == 3
    for whole, halves in zip(alone["grads"], both[0]["grads"], strict=True):
        assert whole.keys() == halves.keys()
        scales = [v for name, values in whole.items() if "shift" in name for v in values]
        assert sum(v != 0 for v in scales) > len(scales) / 2
        for name in whole:
            a, b = np.array(whole[name]), np.array(halves[name])
            # sums of float32 in another order: 1e-5 of the tensor's largest gradient
            assert np.abs(a - b).max() <= 1e-5 * max(np.abs(a).max(), 1e-4), name
    assert both[0]["samples"] == alone["samples"] == int(count)
    assert both[0]["loss"] == pytest.approx(alone["loss"], rel=1e-5)


def test_the_same_random_widths_everywhere(one, two):
    for count in map(str, scenarios.COUNTS):
        drawn = [result["gradients"][count]["drawn"] for result in (one, *two)]
        assert drawn[0] == drawn[1] == drawn[2]
    assert len({tuple(row) for row in drawn[0]}) > 1


def test_gradients_are_reduced_in_the_last_pass_of_a_step_only(two):
    for result in two:
        found = result["gradients"][str(scenarios.COUNTS[0])]
        assert set(found["reductions"]) == {found["passes"] - 1}
        assert len(found["reductions"]) % 3 == 0  # the same number of buckets in each of the three steps


def test_starts_growth_and_indicators_are_equal_everywhere(two):
    assert two[0]["indicators"] == two[1]["indicators"]
    trained, start = two[0]["indicators"]["trained"], two[0]["indicators"]["growth"]
    assert trained != start


def test_the_seed_alone_decides_what_they_are_measured_on(one, two):
    """A shuffled loader, the global generator at another state in each process."""
    import torch

    torch.manual_seed(5)
    again = scenarios.HubMPQ.from_module(scenarios._net(), scenarios.X, task=scenarios.Likeliest())
    found = again.train_indicators(scenarios.loader(shuffle=True), seed=3, steps=0)
    assert scenarios.rounded(found.weight) == one["indicators"]["growth"]["weight"]
    for name, row in one["indicators"]["growth"]["weight"].items():
        if name == "9":  # of no norm: see below
            assert two[0]["indicators"]["growth"]["weight"][name] == pytest.approx(row, rel=1e-3)


@pytest.mark.parametrize("kind", ["scale", "raw scale"])
def test_they_are_of_both_processes_data(one, two, kind):
    alone, both = one["indicators"][f"ordered {kind}"], two[0]["indicators"][f"ordered {kind}"]
    for side in ("weight", "activation"):
        for name, row in alone[side].items():
            # the same samples in other halves: the order of float32 sums
            for bits, value in row.items():
                assert both[side][name][bits] == pytest.approx(value, rel=1e-3), (side, name, bits)


def test_scores_of_scorers_are_averages_too(one, two):
    for name in ("gradient", "mse"):
        assert two[0]["indicators"][name] == two[1]["indicators"][name]
    alone, both = one["indicators"], two[0]["indicators"]
    for layer, row in alone["gradient"].items():
        assert both["gradient"][layer] == pytest.approx(row, rel=1e-3), layer
    # one factor for all layers, which is measured with norms over each process's part
    factor = both["mse"]["3"]["W2A2"] / alone["mse"]["3"]["W2A2"]
    assert factor == pytest.approx(1, rel=0.5)
    for layer, row in alone["mse"].items():
        for bits, value in row.items():
            assert both["mse"][layer][bits] == pytest.approx(factor * value, rel=1e-3), (layer, bits)


def test_a_measurement_is_of_all_samples_once(one, two):
    for result in two:
        assert result["measured"]["labels"].pop("task") == "classification"
        wanted = {name: value for name, value in one["measured"]["labels"].items() if name != "task"}
        assert result["measured"]["labels"] == pytest.approx(wanted, rel=1e-5)
        assert result["measured"]["labels"]["samples"] == 44
    assert [result["measured"]["list"] for result in two] == [3, 2]


def test_norms_count_every_sample_once(one, two):
    """35 of them in one process, 9 in the other."""
    assert two[0]["measured"]["norm"] == two[1]["measured"]["norm"]
    for got, want in zip(two[0]["measured"]["norm"], one["measured"]["norm"], strict=True):
        assert got == pytest.approx(want, rel=1e-4, abs=1e-6)


def test_all_take_the_policy_that_one_process_alone_would_measure(one, two):
    assert two[0]["validated"] == two[1]["validated"]
    found, alone = two[0]["validated"], one["validated"]
    assert {k: found[k] for k in ("chosen_by", "policy", "forwards")} == {
        k: alone[k] for k in ("chosen_by", "policy", "forwards")
    }
    assert [row[0] for row in found["rows"]] == [row[0] for row in alone["rows"]]
    np.testing.assert_allclose([r[1:] for r in found["rows"]], [r[1:] for r in alone["rows"]], rtol=1e-5)


def test_one_process_shows_progress(two):
    assert two[0]["bars"] == [None, None]
    assert two[1]["bars"] == [True, True]


def test_tuned_models_are_equal_everywhere(two):
    assert two[0]["tuned"]["state"] == two[1]["tuned"]["state"]


def test_a_signal_to_one_process_stops_all_and_they_go_on(two):
    for result in two:
        assert result["stopped"]["said"] == "stopped after step 4"
        assert result["stopped"]["states"] == ["step-00000004"]
        assert result["stopped"]["equal"]


def test_a_state_of_two_processes_is_refused_by_one(two, folder):
    with pytest.raises(InvalidArgument, match=r"2 processes with 3 .* this run has 1 process with 3"):
        fit(
            scenarios._net(),
            Finetune(**scenarios.STILL),
            scenarios.loader(44),
            steps=7,
            checkpoint_dir=folder / "stopped",
            resume=True,
        )


def test_sharded_indicators_are_those_of_ddp(two):
    for result in two:
        ddp, sharded = result["fsdp"]["ddp"], result["fsdp"]["fsdp"]
        assert ddp["sharded"] == 0
        assert all("shift" in name for name in sharded["whole"])
        assert len(sharded["whole"]) == len(sharded["shifts"]) == 28  # weights and inputs of 14 layers
        assert sharded["part"] < 0.6 * result["fsdp"]["parameters"]
        assert sharded["loss"] == pytest.approx(ddp["loss"], rel=1e-4)
        for side in ("weight", "activation"):
            for name, row in ddp[side].items():
                for bits, value in row.items():
                    # the order of float32 sums, over six steps
                    assert sharded[side][name][bits] == pytest.approx(value, rel=1e-4), (side, name, bits)
    assert two[0]["fsdp"]["fsdp"]["shifts"] == two[1]["fsdp"]["fsdp"]["shifts"], "scales' gradients are averaged"
    assert any(v != 0 for row in two[0]["fsdp"]["fsdp"]["shifts"].values() for v in row)


def test_a_sharded_training_goes_on_from_its_parts(two):
    for result in two:
        assert result["fsdp"]["said"] == "stopped after step 5"
        for side in ("weight", "activation"):
            assert result["fsdp"]["resumed"][side] == result["fsdp"]["fsdp"][side]


def test_what_one_process_meets_all_raise(two):
    for result in two:
        assert "sample 56 is torn" in result["errors"]["torn"]
        assert "must run in one process" in result["errors"]["ebs"]
        assert "no batch" in result["errors"]["few"]
        assert "sync_batch_norm requires CUDA" in result["errors"]["norms"]
        assert "fsdp did not shard" in result["errors"]["fsdp"]
