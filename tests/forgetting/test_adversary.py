"""The adversary's draws: who is attacked when, under which conditions samples are drawn, what ψ and φ are asked."""

from types import SimpleNamespace

import pytest
import torch

from pecker_fast import draws
from pecker_fast.conditions import class_conditions
from pecker_fast.errors import RecipeError
from pecker_fast.forgetting import Batch, Vectors, coded, half_way, restarting
from pecker_fast.forgetting.adversary import EARLIEST, Adversary, attack_of, first_starts, pool_conditions, start_of
from pecker_fast.networks import Schedule
from pecker_fast.recipe import recipe_from

CLASSES = 6


class Network:
    """Codes as those of a class-conditional network; its own vectors say which class they are of."""

    def free_codes(self, which, c):
        return which + CLASSES


def own(c):
    return 100.0 * (c + 1).float().unsqueeze(1).expand(-1, 512)


def case(init=440, **options):
    recipe = recipe_from(
        {
            "forget": [0, 2],
            "cover": [1, 3],
            "batch_size": 8,
            "timesteps": {"init": init},
            "adversary": {"conditions": 4, **options},
        }
    )
    return recipe, class_conditions([0, 2], [1, 3], None, range(CLASSES))


def forget_branch(recipe, conditions, step, n=8):
    c_g, c_p = conditions.draw("forget", n, draws.generator(0, "test", step))
    empty = torch.empty(n, 1)
    return Batch(empty, empty, empty, empty, c_g, c_g, c_p)


def test_one_vector_in_turn_starts_afresh():
    recipe, _ = case(restart=3)
    turns = {step: restarting(recipe, step) for step in range(20)}
    assert {step: turn for step, turn in turns.items() if turn} == {
        3: (0, 1),
        6: (1, 1),
        9: (2, 1),
        12: (3, 1),
        15: (0, 2),
        18: (1, 2),
    }
    assert not any(restarting(case(restart=0)[0], step) for step in range(20))


def test_starts_take_turns_near_what_they_are_named_after():
    recipe, conditions = case(starts=["forget", "kept", "random"])
    where = lambda k, life: start_of(recipe, conditions, own, k, life, torch.device("cpu"))[0]  # noqa: E731
    assert torch.equal(
        first_starts(recipe, conditions, own, torch.device("cpu")), torch.stack([where(k, 0) for k in range(4)])
    )
    assert not torch.equal(where(0, 0), where(0, 3))
    for k in range(4):
        for life in range(6):
            kind, mean = ("forget", "kept", "random")[(k + life) % 3], float(where(k, life).mean())
            near = [c for c in range(CLASSES) if abs(mean - 100 * (c + 1)) < 45]
            if kind == "forget":
                assert (0, 2)[k % 2] in near  # the class this vector is fitted to
            if kind == "kept":
                assert set(near) & {1, 3, 4, 5}
    spread = torch.stack([where(2, 3 * life) for life in range(20)])
    assert float(spread.std()) > 50
    assert abs(float(spread.mean())) < 45


@pytest.mark.parametrize(("share", "n"), [(0.5, 8), (0.3, 5), (1.0, 3), (0.5, 1)])
def test_a_share_of_the_branch_is_drawn_under_vectors_in_turn(share, n):
    recipe, conditions = case(share=share)
    plain = [forget_branch(recipe, conditions, step, n) for step in range(40)]
    batches = [coded(recipe, conditions, batch, Network(), step) for step, batch in enumerate(plain)]
    c_g = torch.cat([batch.c_g for batch in batches])
    chosen = c_g >= CLASSES
    assert int(chosen.sum()) == int(share * 40 * n)
    assert (c_g[chosen] - CLASSES).tolist() == [i % 4 for i in range(int(chosen.sum()))]
    for before, after in zip(plain, batches):
        own_rows = after.c_g < CLASSES
        for key in ("c_g", "c_s", "c_p"):
            assert torch.equal(getattr(before, key)[own_rows], getattr(after, key)[own_rows])
        # ψ is asked under the class the vector is fitted to, φ under its cover
        forgotten = torch.tensor([0, 2])[(after.c_g - CLASSES) % 2]
        assert torch.equal(after.c_s[~own_rows], forgotten[~own_rows])
        assert torch.equal(after.c_p[~own_rows], forgotten[~own_rows] + 1)


@pytest.mark.parametrize("null", [None, 5])
def test_a_part_of_the_branch_sets_out_from_noised_images_at_any_timestep(null):
    torch.manual_seed(0)
    _, conditions = case()
    n, a = 400, torch.linspace(0.99, 0.05, 50)
    network = SimpleNamespace(schedule=Schedule(a, (1 - a**2).sqrt(), "epsilon", {}), null_class=null)
    c_g, c_p = conditions.draw("forget", n, draws.generator(0, "test", 0))
    z, t = torch.randn(n, 1, 2, 2), torch.full((n,), 30)
    attacked = torch.arange(n) % 2 == 0
    batch = Batch(z, t, z, t, torch.where(attacked, c_g + 100, c_g), c_g, c_p)
    images, covers = torch.randn(2, 7, 1, 2, 2)
    c = torch.zeros(7, dtype=torch.long)
    adversary = Adversary(Vectors.start(torch.zeros(4, 8)), images, c, covers, 0)

    def made(share=0.25, step=0):
        return half_way(
            case(half_way=share, init=30)[0], adversary, batch, network, draws.generator(0, "half-way", step)
        )

    assert made(share=0) is batch
    moved = made()
    chosen = (moved.z != z).flatten(1).any(1)
    assert 75 < chosen.sum() < 125  # of 200 samples that are not attacked half: 100 ± 3.5 deviations
    assert not (chosen & attacked).any()
    for name in ("z", "t_g", "c_g", "c_s"):
        assert torch.equal(getattr(moved, name)[~chosen], getattr(batch, name)[~chosen])
    assert moved.t_g[chosen].min() >= EARLIEST * 50
    assert moved.t_g[chosen].max() > 40
    assert len(moved.t_g[chosen].unique()) > 20
    # θ starts from b_t z: an image of the pool, noised
    a, b = network.schedule.coefficients(moved.t_g)
    left = (b * (moved.z - z) / a)[chosen]
    of_concept, of_cover = (((left[:, None] - of).abs().flatten(2).amax(2).amin(1) < 1e-4) for of in (images, covers))
    assert (of_concept | of_cover).all()
    assert 30 < of_concept.sum() < 70
    if null is None:
        assert moved.c_g is batch.c_g
        assert moved.c_s is batch.c_s
    else:
        assert (moved.c_s[chosen] == null).all()
        empty = moved.c_g == null
        assert not (empty & ~chosen).any()
        assert 0.1 < empty[chosen & (moved.t_g <= 30)].float().mean() < 0.25  # .3 of the half that shows the concept
        assert (moved.t_g[empty] <= 30).all()
        assert not (empty[chosen] & of_cover).any()
        assert torch.equal(moved.c_g[~empty], batch.c_g[~empty])
    for same in ("e", "t", "c_p"):
        assert getattr(moved, same) is getattr(batch, same)
    assert torch.equal(made().z, moved.z)
    assert not torch.equal(made(step=1).z, moved.z)


def test_a_vector_is_fitted_to_images_of_its_class():
    recipe, conditions = case(samples=7, batch=8, steps=2)
    c = pool_conditions(recipe, conditions)
    assert c.tolist() == [0, 2, 0, 2, 0, 2, 0]
    assert pool_conditions(*case(samples=1)).tolist() == [0, 2]

    images = torch.arange(7.0).view(7, 1, 1, 1)
    adversary = Adversary(Vectors.start(torch.zeros(4, 8)), images, c, images[:0], seed=0)
    seen = set()
    for step in range(10):
        for n in range(2):
            attack = attack_of(recipe, conditions, adversary, Network(), step, n)
            index = attack.target.flatten().long()
            assert torch.equal(attack.z, adversary.z[index])  # an image and the noise it was drawn of
            assert torch.equal(c[index], torch.tensor([0, 2])[(attack.codes - CLASSES) % 2])
            assert sorted((attack.codes - CLASSES).tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]
            seen |= set(index.tolist())
    assert seen == set(range(6))  # pairs of both classes


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"adversary": {"conditions": 2}, "weights": {"forget": 0}}, "adversary.conditions: with weights.forget=0 there is no"),
        ({"adversary": {"conditions": 1}, "forget": [0, 2]}, "adversary.conditions: 1 cannot attack 2 classes; give one for each"),
        ({"adversary": {"conditions": 2}, "engine": {"cuda_graph": True}}, "is not supported with engine.cuda_graph"),
        ({"adversary": {"starts": []}}, "adversary.starts: expected 1 values, got []"),
        (
            {"adversary": {"starts": ["forgt"]}},
            "adversary.starts.0: expected one of forget, kept, random, got 'forgt'; did you mean forget?",
        ),
        (
            {"adversary": {"conditions": 2, "share": 0.7, "half_way": 0.4}},
            "adversary.half_way: 0.4 and adversary.share=0.7 are more than all of the forget branch; lower one",
        ),
        ({"adversary": {"share": 0}}, "adversary.share: expected a number in (0, 1], got 0"),
    ],
)  # fmt: skip
def test_refused_in_one_line(keys, message):
    with pytest.raises(RecipeError) as caught:
        recipe_from(keys)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
