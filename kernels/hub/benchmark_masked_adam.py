"""A step on a tenth of 16 M weights beside torch's fused Adam on all of them: `kernels benchmark REPO`."""

import torch
from kernels.benchmark import Benchmark


class MaskedAdamBenchmark(Benchmark):
    seed = 0

    def setup(self) -> None:
        self.weight = torch.nn.Parameter(torch.randn(4096, 4096, device=self.device))
        self.weight.grad = torch.randn_like(self.weight)
        named = [("weight", self.weight)]
        scores = {"weight": torch.rand(4096, 4096, device=self.device)}
        mask = self.kernel.SaliencyMask.from_scores(scores, density=0.1)
        self.masked = self.kernel.MaskedAdam(named, mask=mask, lr=1e-4)
        self.dense = torch.optim.Adam([self.weight], lr=1e-4, fused=True)
        self.out = torch.empty(0, device=self.device)

    def benchmark_masked_step(self) -> None:
        self.masked.step()

    def benchmark_dense_step(self) -> None:
        self.dense.step()
