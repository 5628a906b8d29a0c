"""Packed files and configs of a hostile author: loads give what the file says, and refusals are cheap.

    python examples/benchmarks/hostile_files.py [--count 25000] [--seed 1] [--bombs]

Mutants (mutants.py, with valid digests) of four packed models are loaded into two networks with different random
weights. If a mutant loads, both networks must give bit-identical outputs, and so must the model after it is saved and
loaded again. Printed are counts of what went wrong: a model that the file does not determine (`not from file`), an
error that is not a HubMPQError (`crash`), more than 20 s (`hang`), more than 200 MB (`memory`), a flipped bit that
loads (`silent`), a model that cannot be saved (`refused at save`), a message of several lines or of more than 500
characters (`message`). Bombs are folders of at most 200 KB that describe something huge. Each is loaded in a separate
process; the table shows its CPU time and its memory above that of importing hub_mpq, timm and transformers.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm  # noqa: F401 (the memory that it takes is not a bomb's)
import torch
import transformers
from mutants import Mutants, compact, seal, split
from torch import Tensor, nn

from hub_mpq import HubMPQ
from hub_mpq.errors import HubMPQError

PACKED, CONFIG = "model.mpq.safetensors", "config.json"


class Convolutions(nn.Module):
    """Convolutions, one of them depthwise, a norm, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.c2, self.c3 = nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.Conv2d(8, 8, 1, bias=False)
        self.f1, self.f2 = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.c2(torch.relu(self.bn(self.c1(x)))))
        return self.f2(torch.relu(self.f1(torch.relu(self.c3(x)).mean((2, 3)))))  # type: ignore[no-any-return]


class Tokens(nn.Module):
    """An embedding, two layers that read one input, and a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.q, self.k = nn.Embedding(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 8, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids)
        return self.head(torch.relu(self.q(x)) + self.k(x))  # type: ignore[no-any-return]


NETWORKS = {"conv": Convolutions, "text": Tokens}
IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
IDS = torch.arange(12).reshape(2, 6) % 8


def network(kind: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = NETWORKS[kind]().eval()
    for name, buffer in net.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return net


def example(kind: str) -> Tensor:
    return {"conv": IMAGE, "text": IDS, "timm": IMAGE.repeat(1, 1, 4, 4)}.get(kind, IDS)


def bases(root: Path) -> dict[str, Path]:
    """Return the packed folders to start from: two custom networks, a timm model and transformers models."""
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    bert = transformers.BertConfig(vocab_size=64, max_position_embeddings=32, num_labels=3, **small)
    transformers.BertForSequenceClassification(bert).save_pretrained(root / "bert-float")
    vit = transformers.ViTConfig(image_size=16, patch_size=8, **small)
    transformers.ViTForImageClassification(vit).save_pretrained(root / "vit-float")
    neo = {"attention_types": [[["global", "local"], 10]], "num_layers": 20, "num_heads": 1, "intermediate_size": 4}
    neo_config = transformers.GPTNeoConfig(vocab_size=64, max_position_embeddings=64, hidden_size=4, **neo)
    transformers.GPTNeoForCausalLM(neo_config).save_pretrained(root / "neo-float")
    timm_model = HubMPQ.from_pretrained("test_resnet", pretrained=False, num_classes=4, input_size=(3, 32, 32))
    made = {kind: HubMPQ.from_module(network(kind, 0), (example(kind)[:1],)) for kind in NETWORKS}
    made |= {
        "timm": timm_model,
        **{kind: HubMPQ.from_pretrained(root / f"{kind}-float") for kind in ("bert", "vit", "neo")},
    }
    swin = {"embed_dim": 4, "depths": [24, 2, 2, 2], "num_heads": [1] * 4, "num_classes": 4}
    made["swin"] = HubMPQ.from_pretrained("swin_tiny_patch4_window7_224", pretrained=False, **swin)
    for kind, mpq in made.items():
        mpq.apply_policy("W2A4" if kind == "timm" else "W4A4")
        mpq.save_pretrained(root / kind)
    return {kind: root / kind for kind in made}


class Hang(BaseException):
    """A mutant took more than 20 s."""


def _alarm(*args: Any) -> None:
    raise Hang


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def _load(kind: str, folder: Path, seed: int) -> HubMPQ:
    torch.manual_seed(seed)
    return HubMPQ.from_pretrained(folder, module=network(kind, seed) if kind in NETWORKS else None)


def _logits(mpq: HubMPQ, kind: str) -> Tensor:
    out = mpq(example(kind))
    return torch.nan_to_num(out if isinstance(out, Tensor) else out.logits, 7.0)


def judge(kind: str, folder: Path, way: str, work: Path) -> str:
    """Judge a mutant in a folder: "refused", "loaded", or what is wrong with it."""
    before, stage = _peak(), "load"
    signal.alarm(20)
    try:
        first, second = _load(kind, folder, 101), _load(kind, folder, 202)
        outputs = _logits(first, kind)
        if not torch.equal(outputs, _logits(second, kind)):
            return "not from file"
        if way == "bytes_of_the_file":
            return "silent"
        first.report()
        stage = "save"
        first.save_pretrained(work)
        if not torch.equal(_logits(_load(kind, work, 303), kind), outputs):
            return "saved again it differs"
    except HubMPQError as error:
        if stage == "save":
            return "refused at save"
        return "message" if "\n" in str(error) or len(str(error)) > 500 else "refused"
    except Hang:
        return "hang"
    except Exception as error:
        return f"crash: {type(error).__name__}: {str(error)[:80]}"
    finally:
        signal.alarm(0)
    return "memory" if _peak() - before > 200 else "loaded"


def run_mutants(kind: str, base: Path, count: int, seed: int, root: Path) -> Counter[tuple[str, str]]:
    """Load `count` mutants of a packed folder; {(mutation, verdict): count}. Wrong ones are kept in `root`."""
    work, found = root / f"work-{kind}", Counter[tuple[str, str]]()
    shutil.copytree(base, work)
    mutants = Mutants(base, seed)
    signal.signal(signal.SIGALRM, _alarm)
    for _ in range(count):
        way, data = mutants.make()
        (work / PACKED).write_bytes(data)
        verdict = judge(kind, work, way, root / "again")
        if verdict not in ("refused", "loaded") and not found[way, verdict]:
            shutil.copytree(work, root / f"wrong-{kind}-{len(found)}")
        found[way, verdict] += 1
    return found


Change = Callable[[dict[str, Any]], Any]


def _changed(base: Path, folder: Path, config: Change | None = None, manifest: Change | None = None) -> Path:
    """Copy a packed folder and change its config.json or its manifest."""
    shutil.copytree(base, folder)
    if config is not None:
        tree = json.loads((base / CONFIG).read_text())
        config(tree)
        (folder / CONFIG).write_text(json.dumps(tree))
    if manifest is not None:
        header, payload = split((base / PACKED).read_bytes())
        tree = json.loads(header["__metadata__"]["manifest"])
        manifest(tree)
        zeros = {"digest": "0" * 64, "payload_sha256": "0" * 64, "manifest": compact(tree, sort=True)}
        text = compact({**header, "__metadata__": {**header["__metadata__"], **zeros}})
        (folder / PACKED).write_bytes(seal(text, payload))
    return folder


def _arguments(**given: Any) -> Change:
    return lambda config: config.setdefault("model_args", {}).update(given)


def _top(**given: Any) -> Change:
    return lambda config: config.update(given)


def _both(*changes: Change) -> Change:
    return lambda tree: [change(tree) for change in changes]


def _input(*shape: int) -> Change:
    return lambda manifest: manifest["graph"].update(input_shape=list(shape))


def _provenance(manifest: dict[str, Any]) -> None:
    manifest["provenance"]["z"] = {f"k{i:06d}": 0 for i in range(12_000)}


_REGNET = {"depth": 10**5, "wa": 1e9, "w0": 8, "wm": 1.0000001}


def bombs(base: dict[str, Path], root: Path) -> Iterator[tuple[str, Path]]:
    """Yield (description, folder) of each bomb; none has more than 200 KB."""
    configs: list[tuple[str, str, Change]] = [
        ("vit_huge in place of test_resnet", "timm", _top(architecture="vit_huge_patch14_224")),
        ("num_classes 1e9", "timm", _arguments(num_classes=10**9)),
        ("num_classes 1e5, drop_rate NaN", "timm", _arguments(num_classes=10**5, drop_rate=float("nan"))),
        ("in_chans 1e7", "timm", _arguments(in_chans=10**7)),
        ("layers [3000, 1, 1, 1]", "timm", _arguments(layers=[3000, 1, 1, 1])),
        ("layers [1e6, 1, 1, 1]", "timm", _arguments(layers=[10**6, 1, 1, 1])),
        ("layers [-1, 1, 1, 1]", "timm", _arguments(layers=[-1, 1, 1, 1])),
        ("channels 1e6", "timm", _arguments(channels=[10**6] * 4)),
        ("test_vit, depth 1e5", "timm", _both(_top(architecture="test_vit"), _arguments(depth=10**5))),
        ("test_vit, depth 1e6", "timm", _both(_top(architecture="test_vit"), _arguments(depth=10**6))),
        ("test_vit, img_size 40000", "timm", _both(_top(architecture="test_vit"), _arguments(img_size=40000))),
        ("input_size [3, 20000, 20000]", "timm", lambda c: c["pretrained_cfg"].update(input_size=[3, 20000, 20000])),
        ("vocab_size 5e7, unknown activation", "bert", _top(vocab_size=5 * 10**7, hidden_act="os.system")),
        ("vocab_size 1e11", "bert", _top(vocab_size=10**11)),
        ("num_labels 1e9", "bert", _both(_top(num_labels=10**9), lambda c: c.pop("id2label", None))),
        ("num_hidden_layers 1e5", "bert", _top(num_hidden_layers=10**5)),
        ("num_hidden_layers 1e6", "bert", _top(num_hidden_layers=10**6)),
        ("max_position_embeddings 1e10", "bert", _top(max_position_embeddings=10**10)),
        ("image_size 40000", "vit", _top(image_size=40000)),
        ("image_size 20000, patch_size 20000", "vit", _top(image_size=20000, patch_size=20000)),
    ]
    configs += [
        ("12 masks of 110 MB beside the weights", "swin", _arguments(img_size=3000)),
        ("a list of 1e8 words", "neo", _top(attention_types=[[["global"] * 1000, 10**5]])),
        ("100,000 stages", "timm", _both(_top(architecture="regnetx_002"), _top(model_args=_REGNET))),
    ]
    video = {"model_type": "videomae", "architectures": ["VideoMAEModel"], "patch_size": 2, "num_frames": 2}
    configs.append(("a table of 1e9 positions in Python", "vit", _top(**video, image_size=10**5)))
    manifests: list[tuple[str, str, Change]] = [
        ("input of the manifest [3, 20000, 20000]", "timm", _input(3, 20000, 20000)),
        ("input of the manifest [1e12]", "bert", _input(10**12)),
        ("12,000 keys of provenance", "bert", _provenance),
    ]
    for i, (what, kind, change) in enumerate(configs):
        yield what, _changed(base[kind], root / f"config-{i}", config=change)
    for i, (what, kind, change) in enumerate(manifests):
        yield what, _changed(base[kind], root / f"manifest-{i}", manifest=change)


def cost(load: Callable[[], Any], limit: int = 120) -> tuple[str, float, float]:
    """Return (answer of a load, MB, CPU-seconds), measured in a forked process after all imports."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        start, base = (
            time.process_time(),
            int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE"),
        )
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
        resource.setrlimit(resource.RLIMIT_AS, (base + (16 << 30),) * 2)
        try:
            answer = f"loaded {type(load()).__name__}"
        except HubMPQError as error:
            answer = f"refused: {error}"
        except BaseException as error:
            answer = f"crash: {type(error).__name__}: {error}"
        taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - base / 2**20
        os.write(write, json.dumps([answer[:300], taken, time.process_time() - start]).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    return tuple(json.loads(text)) if text else ("killed", float("nan"), float(limit))


def _load_at_all(folder: Path) -> Any:
    return HubMPQ.from_pretrained(folder).model


def run_bombs(root: Path) -> None:
    answer, _, _ = cost(lambda: bases(root))  # in a separate process: this one only has the imports
    if not answer.startswith("loaded"):
        raise SystemExit(answer)
    base = {kind: root / kind for kind in ("timm", "bert", "vit", "swin", "neo")}
    print("| bomb | KB | MB | CPU s | answer |\n| --- | ---: | ---: | ---: | --- |")
    for what, folder in [*((f"control: {kind}, unchanged", base[kind]) for kind in base), *bombs(base, root)]:
        size = sum(path.stat().st_size for path in folder.iterdir()) / 1000
        answer, taken, seconds = cost(lambda folder=folder: HubMPQ.from_pretrained(folder).model)
        said = answer.replace(f"{root}/", "").replace("|", "/")[:110]
        print(f"| {what} | {size:.0f} | {taken:.0f} | {seconds:.1f} | {said} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=25_000, help="total number of mutants")
    parser.add_argument("--seed", type=int, default=1, help="seed of the mutants")
    parser.add_argument("--bombs", action="store_true", help="load the bombs instead of the mutants")
    parser.add_argument("--keep", type=Path, help="folder in which to keep the mutants that are wrong")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        root = args.keep or Path(made)
        root.mkdir(parents=True, exist_ok=True)
        if args.bombs:
            run_bombs(root)
            return
        base = bases(root)
        share = {"conv": 0.48, "text": 0.48, "timm": 0.02, "bert": 0.02}
        for kind, part in share.items():
            found = run_mutants(kind, base[kind], round(args.count * part), args.seed, root)
            verdicts = Counter[str]()
            for (_, verdict), many in found.items():
                verdicts[verdict] += many
            print(f"{kind}: {sum(verdicts.values())} mutants, {dict(verdicts)}", flush=True)
            for (way, verdict), many in sorted(found.items()):
                if verdict not in ("refused", "loaded"):
                    print(f"  {many} of {way}: {verdict}")


if __name__ == "__main__":
    main()
