"""The Triton Adam step inside a CUDA graph; defined only where there is a GPU, so that nothing is skipped elsewhere."""

import torch
from adam_rig import with_settings
from pecker_kernels import dispatch, reference
from pecker_kernels.adam.jobs import AdamJob
from pecker_kernels.gpu import adam

N = 5000


def make(state, masked):
    """Fill `state`; returns a function that makes its next job, with a fresh gradient that pulls weights to 1."""
    bits, width = None, N
    if masked:
        keep = torch.rand(N, generator=torch.Generator().manual_seed(0)) < 0.3
        bits, width = reference.pack_bits(keep).cuda(), int(keep.sum())
    if not state:
        state.update(param=torch.zeros(N, device="cuda"), step=torch.zeros((), device="cuda"), bits=bits)
        state.update({name: torch.zeros(width, device="cuda") for name in ("exp_avg", "exp_avg_sq")})

    def job():
        grad = state["param"] - 1
        moments = (state["exp_avg"], state["exp_avg_sq"])
        return AdamJob(state["param"], grad, None, state["bits"], False, masked, *moments, None, None, state["step"], 0)

    return job


def train(masked, graphed, steps=6):
    """Each iteration allocates its gradient anew, under capture in the graph's own pool."""
    lr = torch.tensor(1e-2, device="cuda")
    settings, cache, state = with_settings(lr=lr, clip_norm=1.0), {}, {}
    job = make(state, masked)

    def iteration():
        state["step"].add_(1)
        adam.step([job()], settings, cache)

    weights = []
    iteration()
    graph = None
    if graphed:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            iteration()
    for i in range(steps):
        lr.fill_(1e-2 / (i + 1))
        if graph is None or i == 3:  # an eager step between two replays
            iteration()
        else:
            graph.replay()
        weights.append(state["param"].clone())
    return weights


if not dispatch.interpreted():

    def test_replays_are_steps():
        for masked in (False, True):
            eager, graphed = train(masked, False), train(masked, True)
            assert all(torch.equal(a, b) for a, b in zip(eager, graphed, strict=True))
            assert not torch.equal(eager[0], eager[-1])
