"""Three offline learners of continuous control, each a small LightningModule: BC, TD3+BC and IQL.

Delete the lines marked `# samplewise` and each is an ordinary one that a loader of uniformly drawn transitions feeds.

- BC: the policy imitates the actions.
- TD3+BC (Fujimoto & Gu, NeurIPS 2021): two critics by temporal differences, a policy that climbs the first one and
  stays near the actions: L = -Q(s, pi(s)) * 2.5 / mean|Q| + (pi(s) - a)^2.
- IQL (Kostrikov et al., ICLR 2022): V is an expectile of Q over the actions of the data, Q follows r + 0.99 V(s'), and
  the policy imitates with weights exp(3 (Q - V)); here it is deterministic, so that imitation is a squared error.

Observations are standardised by the data's mean and deviation, actions scaled to [-1, 1], and rewards scaled so that
the returns of the data span 1,000 (as IQL does for locomotion); all three see the same, whatever draws their batches.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Adam
from typing_extensions import override

if TYPE_CHECKING:
    from samplewise.recipes.offline_data import Task
    from samplewise.recipes.offline_rl import OfflineRlOptions

Batch = Mapping[str, Tensor]
TARGET_RATE = 0.005
POLICY_NOISE, NOISE_CLIP, POLICY_DELAY, BC_ALPHA = 0.2, 0.5, 2, 2.5  # TD3+BC
EXPECTILE, TEMPERATURE, LARGEST_WEIGHT = 0.7, 3.0, 100.0  # IQL


@dataclass(frozen=True)
class Scaling:
    """From the data's units to the networks'.

    Attributes:
        mean, deviation: float32 `(d,)`, of the observations.
        centre, reach: float32 `(a,)`: actions are `centre + reach * u`, u in [-1, 1].
        reward: what rewards are multiplied with.
    """

    mean: Tensor
    deviation: Tensor
    centre: Tensor
    reach: Tensor
    reward: float

    @classmethod
    def of(cls, task: "Task", low: np.ndarray, high: np.ndarray) -> "Scaling":
        """That of a data set, for actions in `[low, high]`, each `(a,)`."""
        observations = torch.from_numpy(np.array(task.episodes.observations, dtype=np.float32)).flatten(1)
        span = float(np.ptp(task.episodes.returns)) or 1.0
        smallest, largest = (torch.from_numpy(np.asarray(bound, dtype=np.float32)) for bound in (low, high))
        deviation, mean = torch.std_mean(observations, dim=0)
        return cls(mean, deviation + 1e-3, (smallest + largest) / 2, (largest - smallest) / 2, 1000 / span)


def network(inputs: int, outputs: int, hidden: int) -> nn.Sequential:
    """Two hidden layers."""
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
    )


class Critics(nn.Module):
    """Two Q functions: `(B, d)` and `(B, a)` to `(2, B)`."""

    def __init__(self, observations: int, actions: int, hidden: int):
        super().__init__()
        self.both = nn.ModuleList(network(observations + actions, 1, hidden) for _ in range(2))

    @override
    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        pairs = torch.cat([observations, actions], dim=1)
        return torch.stack([critic(pairs).squeeze(1) for critic in self.both])


class Agent(LightningModule):
    """What the learners have in common: the policy, the scaling and the optimizers."""

    mean: Tensor
    deviation: Tensor
    centre: Tensor
    reach: Tensor

    def __init__(self, scaling: Scaling, options: "OfflineRlOptions", observe: Any):
        super().__init__()
        self.options, self.reward_scale = options, scaling.reward
        self.observe = observe  # samplewise
        for name in ("mean", "deviation", "centre", "reach"):
            self.register_buffer(name, getattr(scaling, name))
        self.sizes = len(scaling.mean), len(scaling.centre), options.hidden
        self.policy = nn.Sequential(network(*self.sizes), nn.Tanh())

    def scaled(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Observations `(B, d)`, actions `(B, a)`, rewards `(B,)`, next observations, and 0 where an episode ended."""
        now, then = (
            (batch[key].flatten(1).float() - self.mean) / self.deviation
            for key in ("observations", "next_observations")
        )
        actions = (batch["actions"].flatten(1).float() - self.centre) / self.reach
        return now, actions, batch["rewards"] * self.reward_scale, then, 1 - batch["terminals"].float()

    @torch.no_grad()
    def act(self, observations: np.ndarray) -> np.ndarray:
        """Actions `(m, a)` in the environment's units, of observations float32 `(m, d)`."""
        given = torch.as_tensor(observations, dtype=torch.float32, device=self.device).flatten(1)
        chosen: Tensor = self.centre + self.reach * self.policy((given - self.mean) / self.deviation)
        return chosen.cpu().numpy()

    def adam(self, *modules: nn.Module) -> Adam:
        """Adam over the parameters of some modules."""
        return Adam([weight for module in modules for weight in module.parameters()], self.options.lr, fused=True)


@torch.no_grad()
def follow(targets: Iterable[nn.Module], modules: Iterable[nn.Module]) -> None:
    """Move each target a little towards its module."""
    for target, module in zip(targets, modules, strict=True):
        torch._foreach_lerp_(list(target.parameters()), list(module.parameters()), TARGET_RATE)


class BC(Agent):
    """Behavioural cloning."""

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        now, actions, *_ = self.scaled(batch)
        losses = (self.policy(now) - actions).square().mean(1)
        loss: Tensor = losses.mean()
        loss = self.observe(batch["sample_id"], losses)  # samplewise
        return loss

    @override
    def configure_optimizers(self) -> Any:
        return self.adam(self.policy)


class TD3BC(Agent):
    """TD3 with behavioural cloning."""

    def __init__(self, scaling: Scaling, options: "OfflineRlOptions", observe: Any):
        super().__init__(scaling, options, observe)
        self.automatic_optimization = False  # the policy's loss must not reach the critics
        self.critics = Critics(*self.sizes)
        self.old_policy, self.old_critics = (
            copy.deepcopy(m).requires_grad_(False) for m in (self.policy, self.critics)
        )

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        now, actions, rewards, then, goes_on = self.scaled(batch)
        with torch.no_grad():
            noise = (torch.randn_like(actions) * POLICY_NOISE).clamp(-NOISE_CLIP, NOISE_CLIP)
            next_actions = (self.old_policy(then) + noise).clamp(-1, 1)
            target = rewards + self.options.discount * goes_on * self.old_critics(then, next_actions).amin(0)
        errors = self.critics(now, actions) - target
        losses = errors.square().sum(0)
        loss = losses.mean()
        loss = self.observe(batch["sample_id"], losses, scores=errors.abs().mean(0))  # samplewise
        optimizers: Any = self.optimizers()
        for_policy, for_critics = optimizers
        self.step(for_critics, loss)
        if batch_idx % POLICY_DELAY == 0:
            chosen = self.policy(now)
            value = self.critics.both[0](torch.cat([now, chosen], dim=1))
            climb = -BC_ALPHA * value.mean() / value.abs().mean().detach()
            self.step(for_policy, climb + F.mse_loss(chosen, actions))
            follow((self.old_policy, self.old_critics), (self.policy, self.critics))

    def step(self, optimizer: Any, loss: Tensor) -> None:
        """One step of an optimizer."""
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    @override
    def configure_optimizers(self) -> Any:
        return [self.adam(self.policy), self.adam(self.critics)]


class IQL(Agent):
    """Implicit Q-learning."""

    def __init__(self, scaling: Scaling, options: "OfflineRlOptions", observe: Any):
        super().__init__(scaling, options, observe)
        self.critics, self.value = Critics(*self.sizes), network(self.sizes[0], 1, options.hidden)
        self.old_critics = copy.deepcopy(self.critics).requires_grad_(False)

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        now, actions, rewards, then, goes_on = self.scaled(batch)
        with torch.no_grad():
            target = rewards + self.options.discount * goes_on * self.value(then).squeeze(1)
        advantages = self.old_critics(now, actions).amin(0) - self.value(now).squeeze(1)
        value_loss = ((EXPECTILE - (advantages < 0).float()).abs() * advantages.square()).mean()
        weights = (TEMPERATURE * advantages.detach()).exp().clamp(max=LARGEST_WEIGHT)
        policy_loss = (weights * (self.policy(now) - actions).square().sum(1)).mean()
        errors = self.critics(now, actions) - target
        losses = errors.square().sum(0)
        loss: Tensor = losses.mean()
        loss = self.observe(batch["sample_id"], losses, scores=errors.abs().mean(0))  # samplewise
        total: Tensor = loss + value_loss + policy_loss  # of three networks that share nothing
        return total

    @override
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        follow((self.old_critics,), (self.critics,))

    @override
    def configure_optimizers(self) -> Any:
        return self.adam(self.policy, self.value, self.critics)


AGENTS: dict[str, type[Agent]] = {"bc": BC, "td3_bc": TD3BC, "iql": IQL}
LABELS = {"bc": "BC", "td3_bc": "TD3+BC", "iql": "IQL"}
