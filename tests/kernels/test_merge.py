"""Token merging against a loop over tokens that follows the paper's words."""

import pytest
import torch

from linfusion.kernels.merge import merge, merge_slots, tokens_left, unmerge

X = torch.randn(2, 63, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
GRID = (7, 9)


def slots_of(x=X, counts=(5,), cell=2, seed=1, grid=GRID):
    """Slots of each plan, and how many tokens it leaves."""
    left = [tokens_left(count, grid=grid, cell=cell) for count in counts]
    return merge_slots(x, grid=grid, cell=torch.tensor(cell), left=left, seed=torch.tensor(seed)), left


def targets_of(cell=2, seed=1):
    """What nothing is merged into stands behind all that is kept."""
    (slots,), _ = slots_of(counts=(0,), cell=cell, seed=seed)
    return (slots[0] >= 63 - (7 // cell) * (9 // cell)).nonzero().flatten().tolist()


def by_hand(x, targets, count):
    """Every source's most similar target, then the `count` best pairs of each sample, one by one."""
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
    targets = targets_of(cell)
    assert len(targets) == (7 // cell) * (9 // cell)
    (slots,), (left,) = slots_of(counts=(count,), cell=cell)
    y = merge(X, slots, left)
    want, back = by_hand(X, targets, count)
    assert y.shape[1] == 63 - min(count, 63 - len(targets))
    ordered = torch.stack([torch.stack(sorted(sample, key=lambda r: r.tolist())) for sample in y])
    torch.testing.assert_close(ordered, want)
    torch.testing.assert_close(unmerge(y, slots), back)


def test_one_target_in_every_cell():
    cells = {(t // 9 // 2, t % 9 // 2) for t in targets_of()}
    assert cells == {(y, z) for y in range(3) for z in range(4)}
    others = [targets_of(seed=s) for s in range(1, 6)]
    assert others[0] == targets_of() and len({tuple(o) for o in others}) > 1


def test_plans_share_their_targets():
    """What goes in the smaller plan goes in the larger one, into the same targets."""
    (few, more), (many, fewer) = slots_of(counts=(10, 40), cell=3, seed=0)
    kept, still_kept = many - 6, fewer - 6
    gone = few >= kept
    assert torch.equal(few[gone] - kept, more[gone] - still_kept)
    assert (gone.sum(dim=1) == 16).all() and ((more >= still_kept).sum(dim=1) == 46).all()


def test_means_of_many_keep_their_precision():
    x = (torch.randn(1, 1000, 3, generator=torch.Generator().manual_seed(0)) + 30).bfloat16()
    slots = torch.zeros(1, 1000, dtype=torch.int64)
    mean = x.double().mean(dim=1, keepdim=True)
    assert (merge(x, slots, 1).double() - mean).abs().max() <= 0.51 * 16 * torch.finfo(x.dtype).eps


def test_gradients_go_through_and_back():
    x = X.clone().requires_grad_()
    (slots,), (left,) = slots_of(x, counts=(40,), cell=3)
    assert torch.autograd.gradcheck(lambda t: unmerge(merge(t, slots, left).sin(), slots), x)


def test_a_grid_smaller_than_a_cell():
    with pytest.raises(ValueError, match=r"3 x 21 tokens has no 4 x 4 cell"):
        slots_of(grid=(3, 21), cell=4)


def test_fewer_left_than_targets_and_more_than_there_are():
    (want, got), _ = slots_of(counts=(1000, 1000), cell=3)
    got = merge_slots(X, grid=GRID, cell=torch.tensor(3), left=[3], seed=torch.tensor(1))[0]
    assert torch.equal(got, want.clamp(max=2))
    with pytest.raises(ValueError, match=r"64 of 63 tokens cannot be left"):
        merge_slots(X, grid=GRID, cell=torch.tensor(3), left=[64], seed=torch.tensor(0))


def test_the_op_reads_its_tensors_when_it_runs():
    """One graph for all draws and cells that leave equally many tokens."""
    cell, seed = torch.tensor(3), torch.tensor(1)
    settings = {"grid": list(GRID), "left": [43, 53]}
    torch.library.opcheck(torch.ops.linfusion.merge_slots.default, (X, cell, seed, *settings.values()))
    torch._dynamo.reset()
    compiled = torch.compile(merge_slots, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for cell in (3, 2):
            for seed in (1, 2):
                tensors = {"cell": torch.tensor(cell), "seed": torch.tensor(seed)}
                assert torch.equal(compiled(X, **settings, **tensors), merge_slots(X, **settings, **tensors))
    torch._dynamo.reset()
