"""Small random tables and an optimum of them found by plain counting, to hold the solver against."""

import math
import random


def optimum(table):
    """Best score of a table by dynamic programming over exact cost sums, one row a tie; None when infeasible.

    Keeps every reachable vector of costs: only for small whole-number costs or few layers.
    """
    sign = 1 if table["sense"] == "min" else -1
    limits = list(table["limits"])
    groups = [[name] for name in table["layers"]]
    for tie in table["ties"]:
        joined = [g for g in groups if set(g) & set(tie)]
        groups = [g for g in groups if not set(g) & set(tie)] + [[name for g in joined for name in g]]
    best = {(0,) * len(limits): 0.0}
    for group in groups:
        rows = [table["layers"][name] for name in group]
        options = []
        for choice in rows[0]:
            if all(choice in row for row in rows):
                cost = tuple(sum(row[choice]["cost"].get(limit, 0) for row in rows) for limit in limits)
                options.append((cost, math.fsum(row[choice]["score"] for row in rows)))
        after = {}
        for spent, score in best.items():
            for cost, add in options:
                total = tuple(a + b for a, b in zip(spent, cost, strict=True))
                if all(t <= table["limits"][k] for t, k in zip(total, limits, strict=True)):
                    value = sign * (score + add)
                    if total not in after or value < sign * after[total]:
                        after[total] = score + add
        best = after
    return None if not best else sign * min(sign * score for score in best.values())


def random_table(seed, *, layers=(1, 5), choices=(1, 5), kind=None):
    """A table whose limits are met exactly by some random policy. Kinds differ in scores and costs.

    For more than 6 layers take a kind of few distinct costs ("small", "coarse"), or `optimum` takes long.
    """
    rng = random.Random(seed)
    kind = kind or rng.choice(["wide", "small", "free", "plain", "equal"])
    limits = [f"limit{i}" for i in range(rng.choice([2, 2, 3, 3, 1, 4] if layers[1] <= 6 else [2, 2, 3]))]

    def cost():
        if kind == "wide":
            return {k: rng.randint(0, 10 ** rng.randint(1, 12)) for k in limits if rng.random() < 0.9}
        return {
            k: {"small": rng.randint(0, 4), "coarse": rng.randint(0, 5), "free": 0}.get(kind, rng.randint(1, 30))
            for k in limits
        }

    def score():
        return {"wide": rng.uniform(-1, 1), "small": float(rng.randint(0, 3)), "equal": 0.25}.get(kind, rng.random())

    names = [f"layer{i}" for i in range(rng.randint(*layers))]
    rows = {
        name: {c: {"score": score(), "cost": cost()} for c in sorted(rng.sample("abcde", rng.randint(*choices)))}
        for name in names
    }
    policy = {name: rng.choice(list(rows[name])) for name in names}
    ties = []
    if len(names) > 2 and rng.random() < 0.4:
        tie = rng.sample(names, rng.choice([2, 2, 3]))
        common = set.intersection(*(set(rows[name]) for name in tie))
        if common:
            ties = [tie[:2], tie[1:]] if len(tie) == 3 else [tie]
            policy |= dict.fromkeys(tie, sorted(common)[0])
    used = {k: sum(rows[name][c]["cost"].get(k, 0) for name, c in policy.items()) for k in limits}
    return {"sense": rng.choice(["min", "max"]), "layers": rows, "limits": used, "ties": ties}


def with_limits(table, **limits):
    return {**table, "limits": {**table["limits"], **limits}}
