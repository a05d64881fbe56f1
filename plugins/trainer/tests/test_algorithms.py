import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from kernelm_trainer.algorithms import LEARNING_RATES, Lion, build, set_rate
from kernelm_trainer.schedule import rate_at


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(10, 8)
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.hidden(self.embeddings(ids))))


@pytest.mark.parametrize("algorithm", LEARNING_RATES)
def test_every_algorithm_lowers_the_loss_and_moves_every_parameter(algorithm: str) -> None:
    torch.manual_seed(0)
    model, ids, labels = Toy(), torch.arange(10), torch.arange(10) % 2
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = build(algorithm, model, weight_decay=0.01)
    set_rate(optimizers, {"sgd": 0.5, "momentum": 0.1, "adafactor": 0.1}.get(algorithm, 0.01))
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(ids), labels)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())


def test_lion_takes_the_steps_of_the_paper() -> None:
    p = nn.Parameter(torch.tensor([[1.0, -2.0]]))
    lion = Lion([p], lr=0.1, weight_decay=0.5)
    p.grad = torch.tensor([[3.0, -4.0]])
    lion.step()  # p - lr * (sign(g) + wd * p)
    assert torch.allclose(p, torch.tensor([[1.0 - 0.1 * 1.5, -2.0 - 0.1 * -2.0]]))
    p.grad = torch.tensor([[-0.1, -4.0]])
    before = p.detach().clone()
    lion.step()  # m = 0.03: 0.9 * 0.03 + 0.1 * -0.1 is still positive
    assert torch.allclose(p, before - 0.1 * (torch.tensor([[1.0, -1.0]]) + 0.5 * before))
    assert torch.allclose(lion.state[p]["momentum"], torch.tensor([[0.99 * 0.03 - 0.001, 0.99 * -0.04 - 0.04]]))


def test_muon_takes_the_hidden_matrices_only() -> None:
    model = Toy()
    muon, rest = build("muon", model, 0.01)
    assert [id(p) for g in muon.param_groups for p in g["params"]] == [id(model.hidden.weight)]
    assert sum(len(g["params"]) for g in rest.param_groups) == 4


@pytest.mark.parametrize("tied", [True, False])
def test_muon_leaves_embeddings_and_head_of_a_language_model_alone(tied: bool) -> None:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                         num_attention_heads=2, tie_word_embeddings=tied))  # fmt: skip
    muon, rest = build("muon", model, 0.01)
    taken = {id(p) for group in muon.param_groups for p in group["params"]}
    inside = {id(p) for p in model.model.layers.parameters() if p.ndim == 2}
    assert taken == inside
    assert sum(len(g["params"]) for g in rest.param_groups) == len(list(model.parameters())) - len(inside)


def test_norms_and_biases_do_not_decay() -> None:
    (adamw,) = build("adamw", Toy(), 0.01)
    assert [(g["weight_decay"], {p.ndim for p in g["params"]}) for g in adamw.param_groups] == [(0.01, {2}), (0.0, {1})]


def test_the_rate_rises_then_falls_linearly() -> None:
    assert [round(rate_at(s, 10, 0.2), 3) for s in range(10)] == [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    assert rate_at(0, 10, 0.0) == 1.0
    assert rate_at(9, 10, 1.0) == 1.0
