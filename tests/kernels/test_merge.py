"""Token merging against a loop over tokens that follows the paper's words."""

import pytest
import torch

from linfusion.kernels.merge import merge_plans

X = torch.randn(2, 63, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
GRID = (7, 9)


def by_hand(x, plan, count):
    """Every source's most similar target, then the `count` best pairs of each sample, one by one."""
    targets = plan.targets.tolist()
    sources = [i for i in range(x.shape[1]) if i not in targets]
    merged, back = [], []
    for sample in x:
        cosine = torch.nn.functional.cosine_similarity(sample[sources][:, None], sample[targets][None], dim=-1)
        best, where = cosine.max(dim=1)
        gone = best.argsort(descending=True)[:count].tolist()
        groups = {t: [t] for t in targets}
        for i in gone:
            groups[targets[where[i]]].append(sources[i])
        stay = [s for i, s in enumerate(sources) if i not in gone]
        rows = {tuple([s]): sample[s] for s in stay} | {tuple(g): sample[g].mean(dim=0) for g in groups.values()}
        merged.append(torch.stack(sorted(rows.values(), key=lambda r: r.tolist())))
        out = torch.empty_like(sample)
        for group, value in rows.items():
            out[list(group)] = value
        back.append(out)
    return torch.stack(merged), torch.stack(back)


@pytest.mark.parametrize("cell", [2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 20, 1000])
def test_merge_and_back(cell, count):
    (plan,) = merge_plans(X, grid=GRID, cell=cell, counts=(count,), seed=1)
    assert plan.targets.shape == ((7 // cell) * (9 // cell),)
    y = plan.merge(X)
    want, back = by_hand(X, plan, count)
    assert y.shape[1] == plan.tokens == 63 - min(count, 63 - len(plan.targets))
    ordered = torch.stack([torch.stack(sorted(sample, key=lambda r: r.tolist())) for sample in y])
    torch.testing.assert_close(ordered, want)
    torch.testing.assert_close(plan.unmerge(y), back)


def test_one_target_in_every_cell():
    (plan,) = merge_plans(X, grid=GRID, cell=2, counts=(5,), seed=1)
    cells = {(t // 9 // 2, t % 9 // 2) for t in plan.targets.tolist()}
    assert cells == {(y, z) for y in range(3) for z in range(4)}
    others = [merge_plans(X, grid=GRID, cell=2, counts=(5,), seed=s)[0].targets.tolist() for s in range(1, 6)]
    assert others[0] == plan.targets.tolist() and len({tuple(o) for o in others}) > 1


def test_plans_share_their_targets():
    few, more = merge_plans(X, grid=GRID, cell=3, counts=(10, 40), seed=0)
    assert torch.equal(few.targets, more.targets)
    for sample in range(2):
        assert set(few.gone[sample].tolist()) < set(more.gone[sample].tolist())


def test_gradients_go_through_and_back():
    x = X.clone().requires_grad_()
    (plan,) = merge_plans(x, grid=GRID, cell=3, counts=(40,), seed=0)
    assert torch.autograd.gradcheck(lambda t: plan.unmerge(plan.merge(t).sin()), x)


def test_a_grid_smaller_than_a_cell():
    with pytest.raises(ValueError, match=r"3 x 21 tokens has no 4 x 4 cell"):
        merge_plans(X, grid=(3, 21), cell=4, counts=(5,), seed=0)
