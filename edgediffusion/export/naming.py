"""Which tensor of a checkpoint is which parameter of a network.

A name in the file may differ from the parameter's in these ways, tried in this order:

1. it is the same;
2. it has the prefix of the base model, which transformers adds or leaves out by version (``text_model.``);
3. it lacks that prefix;
4. it has the old names of diffusers' attention layers (``query`` for ``to_q``);
5. it is the name of another parameter that is tied to this one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from edgediffusion.errors import SourceError
from edgediffusion.export.checkpoint import Checkpoint, Stored

# Buffers that old versions of transformers stored, and heads that a loader leaves out.
_IDLE = re.compile(r"(^|\.)(position_ids|lm_head\.weight|logit_scale)$|^decoder\.(block|embed_tokens|final_layer_norm)\.")
_OLD_ATTENTION = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
_SHOWN = 5


def match(
    checkpoint: Checkpoint, wanted: Mapping[str, Sequence[int]], *, tied: Iterable[frozenset[str]] = (), prefix: str = ""
) -> dict[str, Stored]:
    """The stored tensor of every name in ``wanted``, which maps names of parameters to their shapes.

    Raises:
        SourceError: tensors are missing, surplus or of another shape; the message names them.
    """
    aliases = {name: group for group in tied for name in group}
    found: dict[str, str] = {}
    for name in wanted:
        for alias in (name, *sorted(aliases.get(name, frozenset()) - {name})):
            key = next((k for k in _spellings(alias, prefix) if k in checkpoint.tensors), None)
            if key is not None:
                found[name] = key
                break
    _refuse(checkpoint, "lacks tensors of", sorted(set(wanted) - set(found)))
    _refuse(
        checkpoint,
        "has tensors that do not belong to",
        sorted(k for k in set(checkpoint.tensors) - set(found.values()) if not _IDLE.search(k)),
    )
    shapes = {n: (checkpoint.tensors[k].shape, tuple(wanted[n])) for n, k in found.items()}
    _refuse(checkpoint, "has tensors of other shapes than", [f"{n} {got}, not {want}" for n, (got, want) in shapes.items() if got != want])
    return {name: checkpoint.tensors[key] for name, key in found.items()}


def _spellings(name: str, prefix: str) -> Iterable[str]:
    yield name
    for base in (prefix, "text_model"):  # CLIP's text models kept the prefix of a class that no longer states it
        if base:
            yield f"{base}.{name}"
            yield name.removeprefix(f"{base}.")
    for new, old in _OLD_ATTENTION.items():
        if new in name:
            yield name.replace(new, old)


def _refuse(checkpoint: Checkpoint, wrong: str, names: Sequence[str]) -> None:
    if not names:
        return
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    raise SourceError(
        f"The checkpoint of '{checkpoint.folder.name}' {wrong} the network that its config.json describes",
        got=", ".join(names[:_SHOWN]) + more,
        do="Take the config.json and the weights from the same pipeline.",
    )
