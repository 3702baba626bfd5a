"""An optimiser's state by its parameters' names, so that it goes on with other hyper-parameters and in other groups."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from timm_jem.errors import InputError
from timm_jem.training.state import copy_tree, local

__all__ = ["OptimizerState"]


class OptimizerState:
    """What an optimiser has learned, apart from what it was told.

    Made before the first step: what the groups hold by then are hyper-parameters. At :meth:`load_state_dict` those that
    are others now win over the saved ones; all else, moments and counters, is the saved run's. Learning rates are never
    part of it: who sets them, by a schedule say, sets them again.

    Args:
        optimizer: as accelerate prepared it, or plain.
        parameters: names and parameters of the model.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        self.optimizer = getattr(optimizer, "optimizer", optimizer)
        name_of = {id(parameter): name for name, parameter in parameters}
        self.parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.names = [name_of.get(id(parameter), str(i)) for i, parameter in enumerate(self.parameters)]
        self.initial = [copy_tree(_told(group)) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Tensors are live: copy them."""
        whole = self.optimizer.state_dict()
        return {
            "kind": type(self.optimizer).__name__,
            "state": {self.names[i]: of_parameter for i, of_parameter in whole["state"].items()},
            "rest": {name: value for name, value in whole.items() if name not in ("state", "param_groups")},  # Kron's generator
            "groups": [
                {"names": names, "initial": initial, "now": _told(group)}
                for group, names, initial in zip(self.optimizer.param_groups, self._names(), self.initial, strict=True)
            ],
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on where ``saved`` was taken; see the class for what is told anew.

        Raises:
            InputError: a state of another optimiser or of other parameters, or one that lacks what the hyper-parameters of
                now need; nothing has changed then.
        """
        kind, names = type(self.optimizer).__name__, set(self.names)
        if saved["kind"] != kind:
            raise InputError(f"the saved optimizer is {saved['kind']} and this one {kind}: resume with that run's train.opt")
        old = {name: group for group in saved["groups"] for name in group["names"]}
        if differing := sorted(names ^ set(old)):
            raise InputError(
                f"the saved optimizer differs in the parameters that it trains (see {differing[0]}): resume with the settings "
                "of that run"
            )
        groups, place, told_anew = [], 0, False
        for group, of_group, initial in zip(self.optimizer.param_groups, self._names(), self.initial, strict=True):
            before = list({id(old[name]): old[name] for name in of_group}.values())
            told_anew |= any(not _same(source["initial"], initial) for source in before)
            indices = list(range(place, place + len(of_group)))
            groups.append({**group, **_going_on(before, initial), "params": indices})
            place += len(of_group)
        if told_anew:
            self._check_fits(saved["state"])
        state = {i: saved["state"][name] for i, name in enumerate(self.names) if name in saved["state"]}
        # It keeps what it is given, and would change it.
        self.optimizer.load_state_dict(copy_tree({**saved.get("rest", {}), "state": state, "param_groups": groups}))
        for parameter, of_parameter in self._state().items():
            for name, value in of_parameter.items():
                if isinstance(value, Tensor) and value.ndim and value.shape == local(parameter).shape:
                    of_parameter[name] = torch.empty_like(parameter, dtype=value.dtype)  # in its layout and sharding
                    local(of_parameter[name]).copy_(value)

    def _check_fits(self, saved: Mapping[str, Mapping[str, Any]]) -> None:
        """Take a step to see what the hyper-parameters of now keep, and take it back."""
        before = [(dict(group), [p.detach().clone() for p in group["params"]]) for group in self.optimizer.param_groups]
        state = {parameter: dict(kept) for parameter, kept in self._state().items()}
        self._state().clear()
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        try:
            self.optimizer.step()
            needed = {name: set(self._state().get(p, ())) for name, p in zip(self.names, self.parameters, strict=True)}
        finally:
            with torch.no_grad():
                for group, (values, weights) in zip(self.optimizer.param_groups, before, strict=True):
                    group.clear()
                    group.update(values)
                    for parameter, weight in zip(group["params"], weights, strict=True):
                        parameter.copy_(weight)
                        parameter.grad = None
            self._state().clear()
            self._state().update(state)
        # One that has no state starts as at its first gradient.
        for name, kept in saved.items():
            if kept and (lacking := sorted(map(str, needed[name] - set(kept)))):
                raise InputError(
                    f"train.opt_kwargs need {', '.join(lacking)}, which the saved optimizer does not have: resume with those "
                    "of that run"
                )

    def _state(self) -> dict[nn.Parameter, dict[str, Any]]:
        return getattr(self.optimizer, "_base_optimizer", self.optimizer).state  # timm's Lookahead has another inside

    def _names(self) -> list[list[str]]:
        names = iter(self.names)
        return [[next(names) for _ in group["params"]] for group in self.optimizer.param_groups]


def _told(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in ("params", "param_names", "lr")}


def _going_on(before: list[Mapping[str, Any]], initial: Mapping[str, Any]) -> dict[str, Any]:
    """What a group takes over from the groups in which its parameters were: counters, and what is told as it was."""
    kept: dict[str, Any] = {}
    for source in before:
        for name, value in source["now"].items():
            as_told = name in initial and name in source["initial"] and _same(source["initial"][name], initial[name])
            if as_told or (name not in initial and name not in source["initial"]):
                if name in kept and not _same(kept[name], value):
                    raise InputError(
                        f"the saved optimizer has groups whose {name} differ, and they are one now: resume with the "
                        "train.opt_kwargs and train.weight_decay of that run"
                    )
                kept[name] = value
    return kept


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a.cpu(), b.cpu())
    return type(a) is type(b) and a == b
