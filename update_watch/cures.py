"""Cures as code: what to change, in the words of the trainer at hand. The one table that advice, report and docs use.

An entry is Python (torchtune and torchtitan: their own settings) of one to three lines that a reader can paste. It may use
the names that such a script has anyway: `model`, `lr`, `name` of a checkpoint, `batch`, and the trainer's own classes.
tests/callbacks/test_cures.py runs each entry whose trainer is installed: the tensors that stalled then move.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

TRAINERS = {  # as a reader knows them
    "lightning": "Lightning",
    "fabric": "Fabric",
    "transformers": "HF Trainer",
    "trl": "TRL",
    "accelerate": "Accelerate",
    "deepspeed": "DeepSpeed",
    "torchtune": "torchtune",
    "torchtitan": "torchtitan",
    "composer": "Composer",
    "torch": "plain torch",
}


class Cure(str, enum.Enum):
    """What can be changed so that updates arrive."""

    masters = "masters"
    stochastic_rounding = "stochastic_rounding"
    kahan = "kahan"
    fused_decay = "fused_decay"
    fp32_states = "fp32_states"
    fp32_average = "fp32_average"

    def __str__(self) -> str:
        return self.value


TITLES = {
    Cure.masters: "keep FP32 master weights",
    Cure.stochastic_rounding: "round at random (stochastic rounding)",
    Cure.kahan: "keep what rounding takes (Kahan summation)",
    Cure.fused_decay: "add weight decay and gradient in one rounding",
    Cure.fp32_states: "keep the optimizer's state in FP32",
    Cure.fp32_average: "keep the averaged model in FP32",
}

# bytes more for each parameter kept in 16 bits, and for each of its states in 16 bits (AdamW has two). With weights in FP32
# torch keeps their gradients and states in FP32 as well
BYTES = {
    Cure.masters: (4, 2),
    Cure.stochastic_rounding: (0, 0),
    Cure.kahan: (2, 0),
    Cure.fused_decay: (0, 0),
    Cure.fp32_states: (0, 2),
    Cure.fp32_average: (2, 0),
}

BETAS = ("betas", "beta1", "beta2", "beta", "momentum", "alpha", "rho")
OPTIONS = ("fused", "foreach", "kahan_sum", *BETAS)  # what an optimizer may be told, as far as advice speaks of it
# rules that a package has for a cure; where the run's is one of them, the code says it, else AdamW
_RULES = {
    Cure.kahan: ("Adam", "AdamW", "Adan", "Lion", "RAdam", "Ranger", "SGD", "StableAdamW"),
    Cure.fused_decay: ("Adam", "AdamW", "SGD", "Adagrad"),
}

# What runs whichever trainer it is: the optimizer is made by the user's own code.
_ANY = {
    Cure.stochastic_rounding: (
        "from torchao.optim import _AdamW\noptimizer = _AdamW(model.parameters(), lr=lr, bf16_stochastic_round=True)"
    ),
    Cure.kahan: "from optimi import AdamW\noptimizer = AdamW(model.parameters(), lr=lr, kahan_sum=True)",
    Cure.fused_decay: "optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)",
    Cure.fp32_average: "ema = AveragedModel(copy.deepcopy(model).float(), avg_fn=lambda e, p, n: torch.lerp(e, p.float(), 1e-3))",
}

# HF's Trainer makes its optimizer itself unless it is given one
_HANDED = "\ntrainer = Trainer(model, args, optimizers=(optimizer, None))"


def _factory(line: str, made: str) -> str:
    """torchtitan knows Adam, AdamW and Muon by name and has no setting for others."""
    line += "  # beside your configuration's function: torchtitan has no setting for it"
    return f"{line}\nOptimizersContainer._resolve_optimizer_factory = staticmethod(lambda name: lambda groups: {made})"


_OF_TRAINER: dict[Cure, dict[str, str]] = {
    Cure.masters: {
        "lightning": 'trainer = Trainer(precision="bf16-mixed")  # not "bf16-true"; the model stays in FP32',
        "fabric": 'fabric = Fabric(precision="bf16-mixed")  # not "bf16-true"; the model stays in FP32',
        "transformers": (
            "model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)\n"
            "args = TrainingArguments(output_dir, bf16=True)"
        ),
        "trl": 'args = SFTConfig(output_dir, model_init_kwargs={"dtype": "float32"}, bf16=True)',
        "accelerate": 'model.float()\naccelerator = Accelerator(mixed_precision="bf16")',
        "deepspeed": 'config["bf16"] = {"enabled": True}  # its optimizer then holds FP32 weights',
        "torchtune": "dtype: fp32",
        "torchtitan": "--training.dtype float32 --training.mixed_precision_param bfloat16",
        "composer": 'trainer = Trainer(model=model.float(), precision="amp_bf16")',
        "torch": "model.float()\nwith torch.autocast(device, dtype=torch.bfloat16):\n    loss = model(batch)",
    },
    Cure.stochastic_rounding: {
        "transformers": _ANY[Cure.stochastic_rounding] + _HANDED,
        "trl": _ANY[Cure.stochastic_rounding] + _HANDED.replace("Trainer", "SFTTrainer"),
        "torchtune": "optimizer:\n  _component_: torchao.optim._AdamW\n  bf16_stochastic_round: True",
        "torchtitan": _factory("from torchao.optim import _AdamW", "_AdamW(groups, bf16_stochastic_round=True)"),
    },
    Cure.kahan: {
        "transformers": _ANY[Cure.kahan] + _HANDED,
        "trl": _ANY[Cure.kahan] + _HANDED.replace("Trainer", "SFTTrainer"),
        "torchtune": "optimizer:\n  _component_: optimi.AdamW\n  kahan_sum: True",
        "torchtitan": _factory(
            "from optimi import AdamW", "AdamW(groups, lr=0.0, kahan_sum=True)"
        ),  # each group has its rate
    },
    Cure.fused_decay: {
        "transformers": 'args = TrainingArguments(output_dir, optim="adamw_torch_fused")',
        "trl": 'args = SFTConfig(output_dir, optim="adamw_torch_fused")',
        "torchtune": "optimizer:\n  _component_: torch.optim.AdamW\n  fused: True",
        "torchtitan": "--optimizer.implementation fused",
    },
}
# states have the format of the weight they belong to
_OF_TRAINER[Cure.fp32_states] = _OF_TRAINER[Cure.masters]

# a clause that fits into a sentence
_SWITCHES = {
    "lightning": "Trainer(precision='{mixed}')",
    "fabric": "Fabric(precision='{mixed}')",
    "transformers": "load the model with dtype=torch.float32 and keep TrainingArguments({short}=True)",
    "trl": "SFTConfig(model_init_kwargs={{'dtype': 'float32'}}, {short}=True), or load the model with dtype=torch.float32",
    "accelerate": "model.float() and Accelerator(mixed_precision='{short}')",
    "deepspeed": "'{short}': {{'enabled': True}} in its config",
    "torchtune": "dtype: fp32",
    "torchtitan": "training.dtype float32",
    "composer": "Trainer(model=model.float(), precision='amp_{short}')",
    "torch": "model.float() and torch.autocast",
}


def code(cure: Cure, trainer: str, rule: str = "") -> str:
    """One to three lines to paste; "" where the trainer has no way to it.

    Args:
        rule: class of the run's optimizer, where it is known.

    Raises:
        ValueError: a trainer that is not in `TRAINERS`.
    """
    if trainer not in TRAINERS:
        raise ValueError(f"cures.code(trainer={trainer!r}) must be one of {', '.join(TRAINERS)}")
    text = _OF_TRAINER.get(cure, {}).get(trainer) or _ANY.get(cure, "")
    return text.replace("AdamW", rule) if rule in _RULES.get(cure, ()) else text


def code_line(cure: Cure, trainer: str, rule: str = "") -> str:
    """The line of `code` that says it, with what it imports spelled out: "optimizer = optimi.AdamW(...)"."""
    sources: dict[str, str] = {}
    lines = []
    for line in code(cure, trainer, rule).splitlines():
        if found := re.match(r"from (\S+) import (\w+)", line):
            sources[found[2]] = found[1]
        else:
            lines.append(line.partition("  #")[0].strip())
    text = lines[0] if lines else ""
    if text.endswith(":"):  # of a configuration file
        text = f"{text} {{{', '.join(lines[1:])}}}"
    for name, source in sources.items():
        text = re.sub(rf"\b{name}\(", f"{source}.{name}(", text)
    return text


def options_of(group: Mapping[str, Any]) -> tuple[str, ...]:
    """What an optimizer's group can be told, of `OPTIONS`; with "=True" what it has been told."""
    return tuple(f"{name}=True" if group[name] is True else name for name in OPTIONS if name in group)


def cures_for(cause: str, options: Iterable[Sequence[str]]) -> tuple[Cure, ...]:
    """Of `FOR_CAUSE`, what fits. `options`: those of the optimizer of each tensor that has it."""
    each = set(map(tuple, options))
    can_fuse = bool(each) and all("fused" in one for one in each)
    return tuple(cure for cure in FOR_CAUSE.get(cause, ()) if cure is not Cure.fused_decay or can_fuse)


def switch(trainer: str, dtype: str) -> str:
    """The trainer's own switch for FP32 master weights under computation in `dtype`, as a clause."""
    short = "fp16" if dtype == "float16" else "bf16"
    mixed = "16-mixed" if dtype == "float16" else "bf16-mixed"
    return _SWITCHES.get(trainer, _SWITCHES["torch"]).format(short=short, mixed=mixed)


def extra_bytes(cure: Cure, numel: int, states: int = 0) -> int:
    """What the cure costs in memory for so many parameters in a 16-bit format, with so many states each in such a format."""
    each, for_state = BYTES[cure]
    return (each + for_state * states) * numel


# the first is the usual one; causes that are not here are no matter of precision, and have no code
FOR_CAUSE: dict[str, tuple[Cure, ...]] = {
    "weight_rounding": (Cure.masters, Cure.stochastic_rounding, Cure.kahan),
    "decay_rounding": (Cure.fused_decay, Cure.masters, Cure.stochastic_rounding),
    "state_rounding": (Cure.fp32_states,),
    "average_rounding": (Cure.fp32_average,),
    "accumulation_rounding": (Cure.masters,),
}


_PAGE = """# Fix it: what to change, trainer by trainer

<!-- Made from update_watch/cures.py: python -m update_watch.cures > docs/fix.md -->

Each block is to be pasted, and each is run by a test, after which the tensors that stalled move (one that is the same for several
trainers: in one of them at least): `tests/callbacks/test_cures.py`, and `test_cures_elsewhere.py` beside it for trainers that are
no part of a development environment. Those ran last, on a CPU, with TRL 1.16.0, DeepSpeed 0.19.8 (without ZeRO and at stage 1; FP32
masters also at stage 3), torchtune 0.6.1 (full fine-tuning, also with `optimizer_in_bwd`), torchtitan 0.3.0 (FSDP2 over one process)
and Composer 0.32.1 (whose check that a CPU computes in FP32 was taken out).

Which one? The watch names the cause; the table names the cures for it, the cheapest first.

| said | cures |
|---|---|
| BF16 weights round the updates away (`weight_rounding`) | [stochastic rounding](#stochastic-rounding), [Kahan summation](#kahan), [FP32 masters](#masters) |
| weight decay is lost (`decay_rounding`) | [one rounding for decay and gradient](#fused-decay), [stochastic rounding](#stochastic-rounding), [FP32 masters](#masters); not optimi's Kahan, which keeps no remainder of the decay |
| the optimizer's state is rounded (`state_rounding`) | [FP32 states](#fp32-states), or a smaller beta |
| an average does not follow (`average_rounding`) | [the average in FP32](#fp32-average) |
| summed gradients lose micro-batches (`accumulation_rounding`) | [FP32 masters](#masters): gradients then are FP32 too |

A few norms may be kept in FP32 by themselves, beside a model in BF16 (8 bytes for each of their elements):

```python
for module in model.modules():
    if isinstance(module, (torch.nn.LayerNorm, torch.nn.RMSNorm)):
        module.float()
optimizer = torch.optim.AdamW(model.parameters(), lr=lr)  # made after it
with torch.autocast(device, dtype=torch.bfloat16):
    loss = model(batch)
```

torchao's optimizers round weights at random, not their states: in BF16 a second moment with beta2 above 0.996 can grow and not
shrink, and the watch says so; `betas=(0.9, 0.99)` or FP32 states end it.

Every one of them raises the effective learning rate of what stood still: look at the loss, and retune it.
"""


def markdown() -> str:
    """The table as a documentation page."""
    lines = [_PAGE]
    for cure in Cure:
        price = _price(*BYTES[cure])
        lines += [f"## {TITLES[cure][:1].upper()}{TITLES[cure][1:]} {{#{cure.value.replace('_', '-')}}}", "", price, ""]
        seen: dict[str, list[str]] = {}
        for trainer in TRAINERS:
            seen.setdefault(code(cure, trainer), []).append(trainer)
        for text, trainers in seen.items():
            if text:
                lines += [", ".join(TRAINERS[one] for one in trainers), "", f"```{_language(text)}", text, "```", ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def _language(text: str) -> str:
    return "sh" if text.startswith("--") else "python" if "=" in text else "yaml"


def _price(each: int, for_state: int) -> str:
    parts = [f"{each} bytes per parameter"] if each else []
    parts += [f"{for_state} bytes for each of its states in 16 bits"] if for_state else []
    total = f": {each + 2 * for_state} with AdamW" if for_state else ""
    return f"Costs {' and '.join(parts)}{total}." if parts else "Costs no memory."


if __name__ == "__main__":
    print(markdown(), end="")
