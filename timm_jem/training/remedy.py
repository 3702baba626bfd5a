"""What is changed after a rollback."""

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace

from timm_jem.errors import check_number
from timm_jem.objectives import ObjectiveConfig
from timm_jem.sampling import MOST_STEPS, SGLDConfig

__all__ = ["Remedy"]


@dataclass(frozen=True)
class Remedy:
    """What is changed after a rollback, on top of all earlier remedies.

    The authors' advice against divergence: a lower learning rate, more SGLD steps, an L2 penalty ≈ 0.1 on energies
    (jem's README and issues 4 and 8 of its repository).

    Attributes:
        lr: factor of the learning rate.
        num_steps: factor of the number of SGLD steps K, rounded up, to 100,000 at most.
        step_size: factor of the SGLD step size.
        energy_l2: added to the weight of the squared energies.

    Raises:
        InputError: a value outside its range.
    """

    lr: float = 1.0
    num_steps: float = 1.0
    step_size: float = 1.0
    energy_l2: float = 0.0

    def __post_init__(self) -> None:
        for name in ("lr", "step_size"):
            check_number(f"guard ladder {name}", getattr(self, name), above=0, most=1)
        check_number("guard ladder num_steps", self.num_steps, least=1)
        check_number("guard ladder energy_l2", self.energy_l2, least=0)

    def then(self, other: "Remedy") -> "Remedy":
        """Both together."""
        return Remedy(
            self.lr * other.lr,
            self.num_steps * other.num_steps,
            self.step_size * other.step_size,
            self.energy_l2 + other.energy_l2,
        )

    def only(self, heeded: Collection[str]) -> "Remedy":
        """What of it reaches a method that heeds these alone; the learning rate is none of a method's."""
        return Remedy(**{name: value for name, value in asdict(self).items() if name == "lr" or name in heeded})

    def chains(self, sgld: SGLDConfig) -> SGLDConfig:
        """How chains move with it."""
        num_steps = min(math.ceil(sgld.num_steps * self.num_steps), MOST_STEPS)
        return replace(sgld, num_steps=num_steps, step_size=sgld.step_size * self.step_size)

    def objective(self, objective: ObjectiveConfig) -> ObjectiveConfig:
        """The loss with it."""
        return replace(objective, energy_l2=objective.energy_l2 + self.energy_l2)

    def __str__(self) -> str:
        parts = [f"{name} × {getattr(self, name):g}" for name in ("lr", "num_steps", "step_size") if getattr(self, name) != 1]
        return ", ".join(parts + ([f"energy_l2 + {self.energy_l2:g}"] if self.energy_l2 else [])) or "nothing but fresh chains"
