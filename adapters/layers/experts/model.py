"""The tuner: how PEFT adds, switches, saves and loads mixtures of experts."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule
from torch import Tensor, nn

from adapters.errors import InputError
from adapters.layers.experts.classifier import Classifier
from adapters.layers.experts.frozen import FrozenExperts
from adapters.layers.experts.layer import NO_MERGE, PREFIX, ExpertBlock, ExpertLayer, ExpertLinear, Router
from adapters.layers.experts.passes import GatesFromBase
from adapters.layers.experts.places import resolve
from adapters.layers.experts.routing import Routing
from adapters.layers.experts.structure import structure_of


class MoeModel(BaseTuner):
    """PEFT's model of the type MOEADAPTER."""

    prefix = PREFIX
    tuner_layer_cls = ExpertLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  PEFT's declaration

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Resolve the places before anything is changed."""
        peft_config.places = resolve(peft_config, model)
        self.routing = _routing(model)

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        if key in peft_config.places:
            return True
        return _ExcludedModule() if peft_config.exclude_modules else False

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        place = peft_config.places[current_key]
        if peft_config.frozen and self.routing.source is None:
            self.routing.source = GatesFromBase(self.routing)
        self.routing.configs[adapter_name] = peft_config
        active = adapter_name in self.active_adapters
        if isinstance(target, ExpertLayer):
            if isinstance(target, FrozenExperts) != bool(peft_config.frozen):
                raise InputError(
                    f"'{current_key}' has experts of another kind: an X-LoRA and a trained mixture cannot be on one "
                    "model."
                )
            target.update_layer(adapter_name, place, peft_config, peft_config.inference_mode or not active)
            return
        layer: ExpertLayer
        if place.kind == "block":
            structure = structure_of(target)
            assert structure is not None
            layer = ExpertBlock(target, current_key, self.routing, structure)
        elif peft_config.frozen:
            layer = FrozenExperts(target, current_key, self.routing)
        else:
            layer = ExpertLinear(target, current_key, self.routing)
        layer.update_layer(adapter_name, place, peft_config, peft_config.inference_mode)
        if not active:
            layer.requires_grad_(False)
        layer.train(target.training)
        setattr(parent, target_name, layer)

    def _replace_module(self, parent: Any, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Only used to take a layer away; its tensors were made on the base's device."""
        setattr(parent, child_name, new_module)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **options: Any) -> Any:
        model = super()._unload_and_optionally_merge(merge, *args, **options)
        self.routing.detach()
        return model

    def _check_merge_allowed(self) -> None:
        """Refuse, before any layer is touched."""
        raise InputError(NO_MERGE)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """As PEFT's; routers are fp32 in any case."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for module in self.model.modules():
            if isinstance(module, Router | Classifier):
                module.float()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; the base's hooks stay for the others."""
        super().delete_adapter(adapter_name)
        self.routing.configs.pop(adapter_name, None)
        self.routing.records.pop(adapter_name, None)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The file's tensors by the model's names.

        Raises:
            InputError: they are not those of the configuration.
        """
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_tensors(model, adapter_name, found)
        return found


def check_tensors(model: nn.Module, adapter: str, given: dict[str, Tensor]) -> None:
    """Check names and shapes of an adapter's tensors against its layers.

    Raises:
        InputError: one is missing, left over, or has another shape.
    """
    own = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if PREFIX in name and (name.endswith(f".{adapter}") or f".{adapter}." in name.rpartition(PREFIX)[2])
    }
    theirs = {name: tensor for name, tensor in given.items() if PREFIX in name}
    for name in sorted(own.keys() ^ theirs.keys()):
        there = "lacks" if name in own else "has"
        raise InputError(
            f"The adapter's file {there} '{name}', unlike its configuration: the two do not belong together, or the "
            "base is another model."
        )
    for name, tensor in theirs.items():
        if tensor.shape != own[name].shape:
            raise InputError(
                f"'{name}' is {tuple(tensor.shape)} in the adapter's file, but its configuration and this base need "
                f"{tuple(own[name].shape)} (experts, rank and size): use the configuration and base it was saved with."
            )


def _routing(model: nn.Module) -> Routing:
    """The model's context: that of its expert layers, or a new one with hooks on the model."""
    for module in model.modules():
        if isinstance(module, ExpertLayer):
            return module.routing
    made = Routing()
    made.attach(model)
    return made


def expert_layers(model: nn.Module) -> dict[str, ExpertLayer]:
    """Path in the base model -> expert layer."""
    return {module.path: module for module in model.modules() if isinstance(module, ExpertLayer)}


def is_moe(model: Any) -> bool:
    """Whether a model has expert layers."""
    return isinstance(model, torch.nn.Module) and any(isinstance(module, ExpertLayer) for module in model.modules())
