"""The offline learners: what each loss is, on networks of a few weights, and that they learn."""

import types

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from samplewise.recipes import offline_agents
from samplewise.recipes.offline_agents import AGENTS, BC, IQL, TD3BC, Critics, Scaling, follow

OPTIONS = types.SimpleNamespace(hidden=16, lr=3e-3, discount=0.9)
SCALING = Scaling(
    mean=torch.tensor([1.0, -1.0]),
    deviation=torch.tensor([2.0, 0.5]),
    centre=torch.tensor([0.5]),
    reach=torch.tensor([2.0]),
    reward=0.1,
)


def batch(size=64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    observations = torch.randn(size, 2, generator=draw)
    return {
        "sample_id": torch.arange(size),
        "observations": observations,
        "actions": torch.rand(size, 1, generator=draw) * 4 - 1.5,
        "rewards": torch.randn(size, generator=draw),
        "terminals": torch.rand(size, generator=draw) < 0.3,
        "next_observations": observations.roll(1, 0),
    }


class Noted:
    """Stands for `sampler.observe`."""

    def __call__(self, ids, losses, scores=None):
        self.ids, self.losses, self.scores = ids, losses.detach(), scores
        return losses.mean()


def make(name, seed=0):
    torch.manual_seed(seed)
    return AGENTS[name](SCALING, OPTIONS, Noted())


def fit(agent, items, epochs=1):
    loader = DataLoader(items, batch_size=None)
    Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_checkpointing=False, enable_model_summary=False,
        enable_progress_bar=False,
    ).fit(agent, loader)  # fmt: skip


def test_scaling_is_that_of_the_data():
    observations = np.array([[0.0, 10.0], [2.0, 10.0], [4.0, 10.0]], dtype=np.float32)
    episodes = types.SimpleNamespace(observations=observations, returns=np.array([-200.0, 300.0]))
    scaling = Scaling.of(types.SimpleNamespace(episodes=episodes), np.array([-1.0]), np.array([3.0]))
    assert scaling.mean.tolist() == [2.0, 10.0]
    assert scaling.deviation.tolist() == pytest.approx([2.001, 0.001])
    assert (scaling.centre.item(), scaling.reach.item(), scaling.reward) == (1.0, 2.0, 2.0)


def test_what_the_networks_see():
    given = batch(4)
    given["observations"][0] = given["next_observations"][1] = torch.tensor([3.0, -0.5])
    given["actions"][0], given["rewards"][0] = 2.5, 7.0
    now, actions, rewards, then, goes_on = make("bc").scaled(given)
    assert now[0].tolist() == [1.0, 1.0]
    assert (actions[0].item(), rewards[0].item()) == (1.0, pytest.approx(0.7))
    assert torch.equal(then[1], now[0])
    assert goes_on.tolist() == [float(not end) for end in given["terminals"]]


def test_actions_are_in_the_environments_units():
    agent = make("bc")
    observations = batch(5)["observations"]
    actions = agent.act(observations.numpy())
    inside = agent.policy((observations - SCALING.mean) / SCALING.deviation)
    assert actions == pytest.approx((0.5 + 2 * inside).detach().numpy(), abs=1e-6)
    assert actions.shape == (5, 1)


def test_bc_imitates():
    agent, given = make("bc"), batch()
    now, actions, *_ = agent.scaled(given)
    loss = agent.training_step(given, 0)
    assert agent.observe.losses == pytest.approx(((agent.policy(now) - actions) ** 2)[:, 0].detach().numpy())
    assert loss.item() == pytest.approx(agent.observe.losses.mean().item())
    assert torch.equal(agent.observe.ids, given["sample_id"])


def test_iql_by_hand():
    """Each of the three losses, written out anew."""
    agent, given = make("iql"), batch()
    for weight in agent.old_critics.parameters():
        weight.mul_(1.3)  # so that the targets are not the critics
    now, actions, rewards, then, goes_on = agent.scaled(given)
    value, old = agent.value(now).squeeze(1), agent.old_critics(now, actions).min(0).values
    target = rewards + 0.9 * goes_on * agent.value(then).squeeze(1).detach()
    td = torch.stack([q.squeeze(1) - target for q in (net(torch.cat([now, actions], 1)) for net in agent.critics.both)])
    gap = old.detach() - value
    expectile = torch.where(gap < 0, 0.3 * gap**2, 0.7 * gap**2).mean()
    imitation = (torch.exp(3 * gap).clamp(max=100).detach() * (agent.policy(now) - actions).square().sum(1)).mean()
    loss = agent.training_step(given, 0)
    assert loss.item() == pytest.approx((td.square().sum(0).mean() + expectile + imitation).item(), rel=1e-5)
    assert agent.observe.scores.detach().numpy() == pytest.approx(td.abs().mean(0).detach().numpy(), rel=1e-5)
    loss.backward()
    gradients = {
        name: [weight.grad.clone() for weight in getattr(agent, name).parameters()] for name in ("policy", "value")
    }
    for name, alone in (("policy", imitation), ("value", expectile)):  # each network learns from its own loss only
        expected = torch.autograd.grad(alone, list(getattr(agent, name).parameters()))
        for got, wanted in zip(gradients[name], expected, strict=True):
            torch.testing.assert_close(got, wanted)
    assert all(weight.grad is None for weight in agent.old_critics.parameters())


def test_td3_bc_target_by_hand(monkeypatch):
    agent, given = make("td3_bc"), batch()
    monkeypatch.setattr(agent, "optimizers", lambda: (None, None))
    monkeypatch.setattr(agent, "step", lambda optimizer, loss: None)
    monkeypatch.setattr(offline_agents.torch, "randn_like", lambda x: torch.full_like(x, 4.0))  # beyond the clip
    now, actions, rewards, then, goes_on = agent.scaled(given)
    chosen = (agent.old_policy(then) + 0.5).clamp(-1, 1)
    target = rewards + 0.9 * goes_on * agent.old_critics(then, chosen).min(0).values
    errors = agent.critics(now, actions) - target
    agent.training_step(given, 1)
    assert agent.observe.losses.numpy() == pytest.approx(errors.square().sum(0).detach().numpy(), rel=1e-5)


def test_td3_bc_moves_policy_and_targets_every_second_step():
    agent = make("td3_bc")
    before = [weight.clone() for weight in agent.policy.parameters()]
    critics = [weight.clone() for weight in agent.critics.parameters()]
    fit(agent, [batch(seed=1)])  # batch 0: both
    once = [weight.clone() for weight in agent.policy.parameters()]
    assert any((a != b).any() for a, b in zip(before, once, strict=True))
    assert any((a != b).any() for a, b in zip(critics, agent.critics.parameters(), strict=True))
    torch.manual_seed(0)
    other = TD3BC(SCALING, OPTIONS, Noted())
    fit(other, [batch(seed=1), batch(seed=2)])  # batch 1: the critics alone
    for a, b in zip(once, other.policy.parameters(), strict=True):
        assert torch.equal(a, b)
    assert any((a != b).any() for a, b in zip(agent.critics.parameters(), other.critics.parameters(), strict=True))


def test_targets_follow():
    torch.manual_seed(0)
    one, other = Critics(2, 1, 4), Critics(2, 1, 4)
    expected = [0.995 * a + 0.005 * b for a, b in zip(one.parameters(), other.parameters(), strict=True)]
    follow((one,), (other,))
    for got, wanted in zip(one.parameters(), expected, strict=True):
        torch.testing.assert_close(got.detach(), wanted.detach())


def test_iql_moves_its_target():
    agent = make("iql")
    before = [weight.clone() for weight in agent.old_critics.parameters()]
    fit(agent, [batch()])
    for old, was, now in zip(agent.old_critics.parameters(), before, agent.critics.parameters(), strict=True):
        torch.testing.assert_close(old, torch.lerp(was, now.detach(), 0.005))


@pytest.mark.parametrize("name", sorted(AGENTS))
def test_they_find_the_better_action(name):
    """One step, reward -(u - .5)^2 of actions all over [-1, 1]: TD3+BC and IQL lean to .5, BC to the middle, 0."""
    draw = torch.Generator().manual_seed(0)
    scaling = Scaling(torch.zeros(2), torch.ones(2), torch.zeros(1), torch.ones(1), 10.0)
    options = types.SimpleNamespace(hidden=32, lr=3e-3, discount=0.9)
    torch.manual_seed(0)
    agent = AGENTS[name](scaling, options, Noted())

    def items():
        for _ in range(400):
            actions = torch.rand(64, 1, generator=draw) * 2 - 1
            yield {
                "sample_id": torch.arange(64), "observations": torch.zeros(64, 2), "actions": actions,
                "rewards": -(actions[:, 0] - 0.5).square(), "terminals": torch.ones(64, dtype=torch.bool),
                "next_observations": torch.zeros(64, 2),
            }  # fmt: skip

    fit(agent, list(items()))
    action = agent.act(np.zeros((1, 2), np.float32))[0, 0]
    assert (abs(action) < 0.15) if name == "bc" else (0.2 < action < 0.7)


def test_they_are_three():
    assert {"bc": BC, "td3_bc": TD3BC, "iql": IQL} == AGENTS
