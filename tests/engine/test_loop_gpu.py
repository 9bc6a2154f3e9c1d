"""The loop on a GPU: no waiting, no allocation, CUDA graphs. Defined only where there is one: nothing is skipped elsewhere."""

import pytest
import torch
from pecker_kernels import SaliencyMask

from pecker_fast.errors import NonFiniteError
from pecker_fast.runs.loop import iteration

RULES = ["differentiated", "salient_only", "alternating"]
SMOOTH = {"optimizer": {"eps": 1.0}, "lr": {"generator": 1e-2, "score": 1e-2, "warmup": 5}}


def run(engine, state, steps):
    losses = []
    for _ in range(steps):
        losses.append(iteration(engine, state))
        engine.look(state)
    engine.settle(state)
    return [{name: float(loss) for name, loss in step.items()} for step in losses]


if torch.cuda.is_available():

    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    @pytest.mark.parametrize("graph", [False, True])
    @pytest.mark.parametrize("rule", RULES)
    def test_nothing_waits_and_nothing_is_allocated(setup, rule, graph, precision):
        _, engine, state, _ = setup(device="cuda", update_rule=rule, precision=precision, engine={"cuda_graph": graph})
        run(engine, state, 6)
        before = torch.cuda.memory_stats()["num_device_alloc"]
        try:
            torch.cuda.set_sync_debug_mode("error")
            for _ in range(5):
                iteration(engine, state)
                engine.look(state)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        engine.settle(state)
        stats = torch.cuda.memory_stats()
        assert (stats["num_device_alloc"], stats["num_alloc_retries"]) == (before, 0)

    @pytest.mark.parametrize("rule", RULES)
    def test_a_graph_takes_the_steps_of_the_loop(setup, rule):
        """Rates and the average's decay change in every iteration, and the mask once on the way."""
        results = []
        for graph in (False, True):
            _, engine, state, _ = setup(device="cuda", update_rule=rule, engine={"cuda_graph": graph}, **SMOOTH)
            losses = run(engine, state, 8)
            state.updates.set_mask(SaliencyMask.random(state.generator.named_parameters(), density=0.2, seed=9))
            losses += run(engine, state, 8)
            results.append((losses, state))
        (want, eager), (got, graphed) = results
        assert graphed.step == eager.step == 16
        assert graphed.images == eager.images
        for step, (a, b) in enumerate(zip(want, got, strict=True)):
            assert {name: pytest.approx(value, rel=1e-3) for name, value in a.items()} == b, step
        for name, average in eager.ema.items():
            assert torch.allclose(average, graphed.ema[name], rtol=1e-3, atol=1e-5), name
        for optimizer in graphed.optimizers.values():
            assert all(float(s["step"]) == 16 for s in optimizer.state.values())

    @pytest.mark.parametrize("graph", [False, True])
    def test_a_gradient_that_is_not_finite_is_named_and_leaves_no_trace(setup, graph):
        _, engine, state, _ = setup(device="cuda", engine={"cuda_graph": graph})
        run(engine, state, 6)
        before = [p.detach().clone() for _, p in state.generator.named_parameters()] + [
            e.clone() for e in state.ema.values()
        ]
        with torch.no_grad():
            state.teacher.unet.conv_out.bias.fill_(float("nan"))
        with pytest.raises(NonFiniteError, match=r"step 6: the gradient of generator tensor"):
            run(engine, state, 3)
        after = [p for _, p in state.generator.named_parameters()] + list(state.ema.values())
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
