"""Adapters for other tasks than text: the classifier they bring is taken apart from the rest.

For SEQ_CLS and TOKEN_CLS peft saves the modules called `score` and `classifier` whole, whatever
the method (`PeftModelForSequenceClassification`, `PeftModelForTokenClassification`), and targets
nothing inside of them. What remains is an adapter as for any other task. peft's FEATURE_EXTRACTION
wraps the base without a head. Labels' names and the problem's type are no part of peft's format:
`id2label` and `problem_type`, as transformers writes them into config.json, are read where they
stand in the adapter's config.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch

from manylora.adapters_store.files import CONFIG_FILE, WEIGHTS_FILE
from manylora.adapters_store.format import Checkpoint
from manylora.adapters_store.head import Head, HeadLayer, Problem, Task
from manylora.adapters_store.lowering.config_reader import ConfigReader
from manylora.adapters_store.lowering.patterns import Matcher
from manylora.adapters_store.lowering.targets import read_targets
from manylora.adapters_store.lowering.tensors import PREFIX
from manylora.errors import FailedPrecondition, InvalidArgument

HEAD_MODULES = ("classifier", "score")
MAX_LABEL_CHARACTERS = 200

_CLASSIFIERS = (Task.SEQ_CLS, Task.TOKEN_CLS)
_HEAD_TENSOR = re.compile(
    r"(?P<module>classifier|score)(?:\.modules_to_save(?:\.[^.]+)?)?"
    r"(?P<inner>(?:\.[^.]+)*?)\.(?P<parameter>weight|bias)"
)
_ORIGINAL = re.compile(r"(?:classifier|score)\.original_module\..+")
"""The base's own, which peft writes with `bias="all"` and never uses."""
_POOLER = f"{PREFIX}pooler."
_UNWRAPPED = "base_model."  # where peft puts nothing around the base's modules: prompt learning


def read_task(config: Mapping[str, object]) -> Task:
    """The config's task. Raises FailedPrecondition for one that is not served, by name."""
    value = config.get("task_type")
    if value is None:
        return Task.CAUSAL_LM
    for task in Task:
        if task.value == value:
            return task
    raise FailedPrecondition(
        "adapters for this task are not served",
        field=f"{CONFIG_FILE}: task_type",
        found=ascii(value),
        wanted=f"null or one of {', '.join(task.value for task in Task)}",
    )


def check_pooler(config: Mapping[str, object]) -> None:
    """For an encoder's FEATURE_EXTRACTION, whose pooler peft adapts, too, to no effect: raises
    FailedPrecondition where that would change what other modules get, since it is by their number.
    """
    if config.get("peft_type") not in ("TINYLORA", "UNILORA"):
        return
    if read_targets(ConfigReader(config), Matcher()).match("pooler.dense"):
        raise FailedPrecondition(
            "peft counts the base's pooler among the modules",
            field=f"{CONFIG_FILE}: target_modules",
            found="pooler.dense",
            wanted="modules of the layers alone",
        )


def split_head(checkpoint: Checkpoint) -> tuple[Checkpoint, Head | None]:
    """The adapter as for a base without a head, and its head; None for a causal language model's.

    A FEATURE_EXTRACTION adapter's tensors for the base's pooler are left out: no hidden state
    depends on them. A classifier's head has no layers where the file brings none: peft keeps the
    base's then. Raises InvalidArgument where the head or its labels are broken, FailedPrecondition
    for a task that is not served.
    """
    task = read_task(checkpoint.config)
    if task is Task.CAUSAL_LM:
        return checkpoint, None
    if task is Task.FEATURE_EXTRACTION:
        tensors = {n: i for n, i in checkpoint.tensors.items() if not n.startswith(_POOLER)}
        config = {**checkpoint.config, "task_type": None}
        return replace(checkpoint, config=config, tensors=tensors), Head(task)
    names = _layer_tensors(checkpoint)
    layers = _load_layers(checkpoint, names)
    taken = {tensor for parts in names.values() for same in parts.values() for tensor in same}
    rest = replace(
        checkpoint,
        config=_without_head(checkpoint.config),
        tensors={
            name: info
            for name, info in checkpoint.tensors.items()
            if name not in taken and not _ORIGINAL.fullmatch(_bare(name))
        },
    )
    out_size = list(layers.values())[-1].weight.shape[0] if layers else None
    reader = ConfigReader(checkpoint.config)
    return rest, Head(task, layers, _labels(reader, out_size), _problem(reader))


def _without_head(config: Mapping[str, object]) -> Mapping[str, object]:
    """The config without what is read here."""
    own = ("id2label", "label2id", "problem_type")
    rest = {key: value for key, value in config.items() if key not in own}
    rest["task_type"] = None
    saved = ConfigReader(config).texts("modules_to_save")
    if "modules_to_save" in rest:
        rest["modules_to_save"] = [name for name in saved if name not in HEAD_MODULES] or None
    return rest


def _bare(tensor: str) -> str:
    return tensor.removeprefix(PREFIX).removeprefix(_UNWRAPPED)


def _layer_tensors(checkpoint: Checkpoint) -> Mapping[str, Mapping[str, list[str]]]:
    """The head's tensors: layer → "weight" or "bias" → the tensors' names, in the file's order;
    with `bias="all"` peft writes a bias twice."""
    found: dict[str, dict[str, list[str]]] = {}
    for tensor in checkpoint.tensors:
        match = _HEAD_TENSOR.fullmatch(_bare(tensor))
        if match is None or _ORIGINAL.fullmatch(_bare(tensor)):
            continue
        parts = found.setdefault(match["module"] + match["inner"], {})
        parts.setdefault(match["parameter"], []).append(tensor)
    return found


def _load_layers(
    checkpoint: Checkpoint, names: Mapping[str, Mapping[str, list[str]]]
) -> Mapping[str, HeadLayer]:
    all_parts = [same for parts in names.values() for same in parts.values()]
    loaded = checkpoint.load([tensor for same in all_parts for tensor in same])
    for first, *others in all_parts:
        for tensor in others:
            if not torch.equal(loaded[tensor], loaded[first]):
                raise InvalidArgument(
                    "two tensors of one meaning that differ",
                    field=f"{WEIGHTS_FILE}: {tensor}",
                    found=first,
                )
    layers: dict[str, HeadLayer] = {}
    for name in sorted(names):  # "dense" comes before "out_proj", as in the forward pass
        parts = {parameter: same[0] for parameter, same in names[name].items()}
        weight, bias = parts.get("weight"), parts.get("bias")
        field = f"{WEIGHTS_FILE}: {next(iter(parts.values()))}"
        if weight is None or loaded[weight].dim() != 2 or 0 in loaded[weight].shape:
            raise InvalidArgument(
                "a head's layer is linear", field=field, wanted=f"{PREFIX}{name}.weight [out, in]"
            )
        layer = HeadLayer(loaded[weight], None if bias is None else loaded[bias])
        out_size = layer.weight.shape[0]
        if layer.bias is not None and layer.bias.shape != (out_size,):
            raise InvalidArgument(
                "the bias does not go with the weight",
                field=f"{WEIGHTS_FILE}: {bias}",
                found=list(layer.bias.shape),
                wanted=str([out_size]),
            )
        layers[name] = layer
    return layers


def _labels(reader: ConfigReader, out_size: int | None) -> tuple[str, ...]:
    """Of `id2label`: {"0": name, "1": name, …}; empty where it is absent. out_size: None where the
    head is the base's."""
    named = reader.mapping("id2label")
    if not named:
        return ()
    count = len(named) if out_size is None else out_size
    labels = [named.get(str(i)) for i in range(count)]
    texts = [label for label in labels if isinstance(label, str)]
    longest = max(map(len, texts), default=0)
    if len(named) != count or len(texts) != count or longest > MAX_LABEL_CHARACTERS:
        raise InvalidArgument(
            "does not name the head's labels",
            field=reader.field("id2label"),
            found=ascii(named),
            wanted=f"a name of at most {MAX_LABEL_CHARACTERS} characters for each of 0 to "
            f"{count - 1}",
        )
    return tuple(texts)


def _problem(reader: ConfigReader) -> Problem | None:
    value = reader.config.get("problem_type")
    if value is None:
        return None
    for problem in Problem:
        if problem.value == value:
            return problem
    raise InvalidArgument(
        "no such type of problem",
        field=reader.field("problem_type"),
        found=ascii(value),
        wanted=" or ".join(problem.value for problem in Problem),
    )
