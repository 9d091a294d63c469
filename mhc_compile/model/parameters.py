"""Gives the rewrite the parameters of its sites, and registers them on the model once the rewrite has succeeded.

Nothing is registered, hooked or adopted before ``commit``: a conversion that fails leaves the model as it was.
"""

from __future__ import annotations

import logging
from collections import Counter

import torch
from torch import fx, nn

from mhc_compile import compat, ops
from mhc_compile.capture import Builder, ModuleMap
from mhc_compile.capture.graph import meta_value
from mhc_compile.config import Options
from mhc_compile.errors import CheckpointError, LayoutError, MismatchError, WrappedModelError
from mhc_compile.model import guard, marker
from mhc_compile.model.hyper_connection import HyperConnection, hyper_connections, registration_order
from mhc_compile.model.optimizers import adopt, common_parts, watch
from mhc_compile.passes.sites import ResidualChain, ResidualSite

log = logging.getLogger("mhc_compile")

SITE_NAME, HEAD_NAME = "mhc", "mhc_head"

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class SiteParameters:
    """The parameters of one conversion: those that the model holds already, and new ones not yet registered.

    Args:
        gm: the graph being rewritten; gets one placeholder for each parameter, after its own.
        modules: who owns what.
        options: decide what new parameters start with.
    """

    def __init__(self, gm: fx.GraphModule, modules: ModuleMap, options: Options) -> None:
        self.gm, self.modules, self.options = gm, modules, options
        self.slots: list[tuple[HyperConnection, str]] = []
        """Where the value of each added placeholder is found at call time, in placeholder order."""
        self.fresh: list[tuple[nn.Module, tuple[str, ...], nn.Module, str, HyperConnection]] = []
        """(root, path, owner, name, module) of what ``commit`` will register."""
        self.used: dict[int, tuple[str, HyperConnection]] = {}
        self.places: list[tuple[nn.Module, str, HyperConnection]] = []
        """(owner, name, module) of every hyper-connection that the graph uses."""
        self.site_names: dict[int, str] = {}
        """id(site) -> qualified name of its hyper-connection, for the report."""
        self._guarded: list[nn.Module] = []
        self._count: Counter[int] = Counter()
        self._names: Counter[str] = Counter()
        placeholders = gm.graph.find_nodes(op="placeholder")
        self._last: fx.Node | None = placeholders[-1] if placeholders else None
        self._fake_mode = Builder(gm).fake_mode

    # --- ParameterProvider -------------------------------------------------------------------------------------------

    def site(
        self, chain: ResidualChain, site: ResidualSite, spec: ops.CoefficientSpec, width: int
    ) -> dict[str, fx.Node]:
        """Placeholders of the parameters of a site; see ``passes.base.ParameterProvider``."""
        root, path, owner = self._owner(site)
        name = f"{SITE_NAME}{self._count[id(owner)]}"
        self._count[id(owner)] += 1
        self.site_names[id(site)] = ".".join((*path, name))
        self._guarded.extend(self._guard_targets(root, owner, site))
        return self._get(root, path, owner, name, spec, width, chain.sites.index(site), _device(site))

    def head(self, chain: ResidualChain, spec: ops.CoefficientSpec, width: int) -> dict[str, fx.Node]:
        """Placeholders of the learned collapse, owned by the owner of the last site."""
        root, path, owner = self._owner(chain.sites[-1])
        return self._get(root, path, owner, HEAD_NAME, spec, width, 0, _device(chain.sites[-1]))

    def _owner(self, site: ResidualSite) -> tuple[nn.Module, tuple[str, ...], nn.Module]:
        if site.owner is None:
            raise LayoutError(
                "cannot tell which module owns a residual add: its branch reads no parameter of a module",
                where=site.where,
                cure="compile the nn.Module that holds the parameters, not a function over loose tensors",
            )
        root, path = site.owner
        if isinstance(root.get_submodule(".".join(path)), _CONTAINERS):
            path = self._branch_module(site, root)
        return root, path, root.get_submodule(".".join(path))

    def _branch_module(self, site: ResidualSite, root: nn.Module) -> tuple[str, ...]:
        """Owner of a site whose add stands in a loop over a container: what the branch has in common. A further child
        of the container itself would become a step of the user's loop."""
        refs = [ref for node in site.parameters if (ref := self.modules.refs.get(node.name)) and ref.root is root]
        paths = [ref.path for ref in refs if not ref.is_buffer]
        for path in (_common(paths), *paths):
            if not isinstance(root.get_submodule(".".join(path)), _CONTAINERS):
                return path
        raise LayoutError(
            "the module that owns a residual add is a container that calls its children one after the other: there is "
            "no place for parameters",
            where=site.where,
            cure="put the add into an nn.Module that holds the branch as an attribute",
        )

    def _get(
        self, root: nn.Module, path: tuple[str, ...], owner: nn.Module, name: str,
        spec: ops.CoefficientSpec, width: int, position: int, device: torch.device,
    ) -> dict[str, fx.Node]:  # fmt: skip
        module = getattr(owner, name, None)
        qualified = ".".join((*path, name))
        if isinstance(module, HyperConnection):
            problem = module.disagreement(self._new(spec, width, position, "meta").describe())
            if problem:
                raise MismatchError(f"{qualified} was made with {problem} that the options ask for")
        elif module is not None:
            raise MismatchError(
                f"{qualified} exists and is a {type(module).__name__}, not ours", cure="rename that attribute"
            )
        else:
            module = self._new(spec, width, position, device)
            self.fresh.append((root, path, owner, name, module))
        self.used[id(module)] = (qualified, module)
        self.places.append((owner, name, module))
        return {key: self._placeholder(module, key, qualified) for key in _parameter_names(module)}

    def _new(self, spec: ops.CoefficientSpec, width: int, position: int, device: torch.device | str) -> HyperConnection:
        options = self.options
        around = {"variant": options.variant, "collapse": options.collapse}
        return HyperConnection(spec, width, position, options.init, device, **around)

    def _placeholder(self, module: HyperConnection, key: str, qualified: str) -> fx.Node:
        graph = self.gm.graph
        point = graph.inserting_after(self._last) if self._last is not None else graph.inserting_before()
        name = f"p_{qualified}_{key}".replace(".", "_")
        self._names[name] += 1
        if self._names[name] > 1:  # two roots with modules of one name
            name = f"{name}_{self._names[name]}"
        with point:
            node = graph.placeholder(name)
        parameter = module.get_parameter(key)
        compat.mark_static_parameter(node, parameter)
        if self._fake_mode is not None:
            node.meta["example_value"] = self._fake_mode.from_tensor(parameter, static_shapes=True)
        else:
            node.meta["example_value"] = parameter
        self._last = node
        self.slots.append((module, key))
        return node

    def _guard_targets(self, root: nn.Module, owner: nn.Module, site: ResidualSite) -> list[nn.Module]:
        """Where the hook goes: the owner, or modules of the branch when the owner is the frame's own module (Dynamo
        compiles a root's hooks as frames of their own, in which it would not fire)."""
        if owner is not root:
            return [owner]
        targets = []
        for node in site.parameters:
            ref = self.modules.refs.get(node.name)
            if ref is not None and ref.root is root and ref.path:
                targets.append(root.get_submodule(".".join(ref.path)))
        return targets[:1]

    # --- after the rewrite -------------------------------------------------------------------------------------------

    @property
    def values(self) -> list[nn.Parameter]:
        """The parameters in placeholder order."""
        return [module.get_parameter(name) for module, name in self.slots]

    def check(self, wrappers: list[nn.Module]) -> None:
        """Refuse what would lose parameters or leave a model half converted.

        Args:
            wrappers: modules that the roots run inside of, outermost first (a DDP wrapper among them).

        Raises:
            CheckpointError, MismatchError, WrappedModelError.
        """
        for root in self.modules.roots:
            left_over = [
                name
                for name, hc in hyper_connections(root)
                if id(hc) not in self.used and self._is_in_graph(root, name)
            ]
            if left_over:
                raise MismatchError(
                    f"the model holds {len(left_over)} hyper-connections that this graph does not use, e.g. "
                    f"{left_over[0]}: it would run half converted",
                    cure="compile it with the options of its first conversion (streams, variant, include, exclude, "
                    "post_norm)",
                )
            if self.fresh and marker.is_from_checkpoint(root) and not any(hyper_connections(root)):
                raise CheckpointError(
                    "the model's config says that its checkpoint has hyper-connections, but the model holds none: "
                    "from_pretrained dropped them, and training would start them anew",
                    cure="load the checkpoint with mhc_compile.load_state_dict(model, state_dict) before compiling, or "
                    "delete config.mhc to start anew on purpose",
                )
        if self.fresh:
            wrapped = next((w for w in [*wrappers, *self.modules.roots] if compat.is_data_parallel(w)), None)
            if wrapped is not None or compat.under_ddp_optimizer():
                name = type(wrapped).__name__ if wrapped is not None else "DistributedDataParallel"
                raise WrappedModelError(
                    f"{name} has wrapped the model before its hyper-connection parameters exist: "
                    "they would not be synchronised"
                )

    def _is_in_graph(self, root: nn.Module, name: str) -> bool:
        """True if the owner of a hyper-connection has parameters in this graph (a skipped layer has none)."""
        owner = tuple(name.split(".")[:-1])
        return any(ref.root is root and ref.path[: len(owner)] == owner for ref in self.modules.refs.values())

    def commit(self) -> int:
        """Register the new modules, guard the model, let its optimizers adopt; returns the parameters added."""
        for root, _, owner, name, module in sorted(self.fresh, key=lambda entry: registration_order(entry[3])):
            module.train(owner.training)
            owner.add_module(name, module)
            marker.mark(root, self.options.streams, self.options.variant)
        for target in self._guarded:
            guard.install(target)
        roots = {id(root): root for root, *_ in self.fresh}
        for root in roots.values():
            parameters = [p for r, _, _, _, module in self.fresh if r is root for p in module.parameters()]
            adopt(root, parameters)
            watch(root)
        return sum(p.numel() for *_, module in self.fresh for p in module.parameters())


def _common(paths: list[tuple[str, ...]]) -> tuple[str, ...]:
    """The longest common beginning."""
    first = min(paths, default=())
    return first[: common_parts(first, max(paths, default=()))]


def _parameter_names(module: HyperConnection) -> list[str]:
    return [name for name, _ in module.named_parameters(recurse=False)]


def _device(site: ResidualSite) -> torch.device:
    """Device of the branch's parameters (fake tensors say it too)."""
    for node in site.parameters:
        value = meta_value(node)
        if isinstance(value, torch.Tensor):
            return value.device
    return torch.device(meta_value(site.add).device)
