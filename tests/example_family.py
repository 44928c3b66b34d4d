"""A generator from outside the tree: every code drawn on its own, given its position and the class."""

from __future__ import annotations

from torch import Generator as Random
from torch import Tensor, long, nn, rand, searchsorted, zeros
from torch.nn.functional import cross_entropy

from models.config import Flops, GeneratorFields, Latent, Params


class Independent(GeneratorFields):
    """What a grid may set, and what the plan counts."""

    width: int = 1
    class_dropout: float = 0.1

    def params(self, latent: Latent, classes: int) -> Params:
        table = (classes + 1) * latent.tokens * (latent.codebook or 0)
        return Params(table, table)

    def flops(self, latent: Latent, classes: int) -> Flops:
        return Flops(5.0 * latent.tokens * (latent.codebook or 0), 2.0 * latent.tokens * (latent.codebook or 0))

    def flops_sample(self, latent: Latent, classes: int, guided: bool) -> float:
        return self.flops(latent, classes).forward * (2 if guided else 1)

    def activations(self, latent: Latent, classes: int) -> float:
        return 3.0 * latent.tokens * (latent.codebook or 0)

    def build(self, latent: Latent, classes: int) -> nn.Module:
        return Table(self, latent, classes)


class Table(nn.Module):
    """Log-probabilities [class or null, position, code], learnt by gradient."""

    def __init__(self, fields: Independent, latent: Latent, classes: int) -> None:
        super().__init__()
        self.fields, self.classes = fields, classes
        self.draws = {"drop": ("uniform", ())}
        self.logits = nn.Parameter(zeros(classes + 1, latent.tokens, latent.codebook or 0))

    def nll(self, codes: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(self.logits[labels].mT, codes, reduction="none")

    def loss(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        dropped = batch["drop"] < self.fields.class_dropout
        return {"loss": self.nll(batch["codes"], batch["labels"].masked_fill(dropped, self.classes)).mean()}

    def sample(self, labels: Tensor, *, seed: int, guidance: float = 1.0, **_: object) -> Tensor:
        guided = self.logits[-1] + guidance * (self.logits[labels] - self.logits[-1])
        edges = guided.softmax(-1).cumsum(-1)
        numbers = rand((*edges.shape[:-1], 1), generator=Random().manual_seed(seed)).to(edges.device)
        return searchsorted(edges, numbers * edges[..., -1:]).squeeze(-1).to(long)
