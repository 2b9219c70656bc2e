"""Whether the options of a run fit the dataset and the machine."""

from dataclasses import fields

from recgpt_torchrec.config import Pretrain
from recgpt_torchrec.config.defaults import STEPS
from recgpt_torchrec.config.reports.doctor import Doctor
from recgpt_torchrec.config.reports.plan import Plan
from recgpt_torchrec.diagnosis.contents import Contents
from recgpt_torchrec.diagnosis.finding import Finding
from recgpt_torchrec.diagnosis.machine import GIB, Machine
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.planning.hardware import RATINGS
from recgpt_torchrec.planning.report import Estimate
from recgpt_torchrec.texts.commands import program
from recgpt_torchrec.training.execution import BF16_FLAGS, cpu_flags

FEW_STEPS = STEPS // 3
"""Steps per epoch under which the figures at `config.defaults.STEPS` fall off."""
CUT = 0.2
"""Share of the users from which on it is worth knowing that their histories are cut."""
HOUR = 3600.0
MANY_USERS = 1_000_000
"""Users from which on validation of all of them takes long."""


def plan_of(config: Doctor, machine: Machine, ranks: int) -> Plan:
    """The run that the options describe, on this machine."""
    options = {each.name: getattr(config, each.name) for each in fields(Pretrain) if each.name != "output"}
    if machine.gpus and config.device != "cpu":
        first = machine.gpus[0]
        kind = next((name for name, rating in RATINGS.items() if rating.name in first.name.upper()), "h100")
        memory = {"gpu": kind, "hbm": first.memory / GIB}
    else:
        memory = {"gpu": "cpu"}
    return Plan(**{**options, **memory, "device": "auto"}, nodes=1, gpus=ranks, memory=machine.memory / GIB)


def check_settings(config: Doctor, machine: Machine, ranks: int, contents: Contents) -> list[Finding]:
    """Findings about the options of a run on a dataset.

    Args:
        config: with the folder of the dataset.
        machine: as found.
        ranks: number of ranks on it.
        contents: of the dataset.
    """
    try:
        plan = plan_of(config, machine, ranks)
        estimate = Estimate.of(plan)
    except (InputError, ValueError) as error:
        return [Finding("error", "options", str(error), "change the option that is named")]
    findings = [_check_steps(config, estimate, ranks), _check_memory(estimate), *_check_lengths(config, contents)]
    if not (machine.gpus or config.device == "cuda"):
        findings += _check_precision(config)
    workload = estimate.workload
    if config.loss.candidates == "sampled" and config.loss.negatives >= workload.items:
        text = f"{config.loss.negatives:,} negatives of {workload.items:,} items: all of them are drawn each time"
        findings.append(Finding("note", "loss", text, "--loss.candidates all is the same, and faster"))
    if workload.steps is not None:
        hours = workload.steps * estimate.time.seconds / HOUR
        often = config.saving.every_minutes or config.saving.every_steps
        if hours > 1 and not often:
            text = f"an epoch takes about {hours:,.1f} hours, and is saved at its end alone"
            findings.append(Finding("warning", "saving", text, "--saving.every_minutes 15"))
    if workload.users > MANY_USERS and not config.train.validate_users and config.train.validate_every:
        text = f"each validation ranks all items for up to {workload.users:,} users"
        findings.append(Finding("note", "validation", text, "--train.validate_users 100000"))
    return findings


def _check_steps(config: Doctor, estimate: Estimate, ranks: int) -> Finding:
    steps = estimate.workload.steps
    if steps is None:
        return Finding("note", "steps", "the length of an epoch is not known")
    given = config.batch.tokens
    text = f"{steps:,.0f} steps an epoch of {estimate.workload.tokens:,} tokens per rank"
    if steps < FEW_STEPS:
        cure = (
            "leave --batch.tokens out, or give fewer"
            if given != "auto"
            else f"fewer ranks than {ranks}, or more epochs"
            if ranks > 1
            else "more epochs; the log is small"
        )
        return Finding("warning", "steps", f"{text}: with fewer than {FEW_STEPS} quality falls off", cure)
    return Finding("ok", "steps", text)


def _check_memory(estimate: Estimate) -> Finding:
    memory = estimate.memory
    if memory.hardware.device_type == "cuda":
        used, limit, where = memory.total("device"), memory.device_limit, "of each GPU"
    else:
        used, limit, where = memory.host_total, memory.host_limit, "of this machine"
    text = f"about {used / GIB:,.2f} GiB of {limit / GIB:,.1f} {where}"
    if not memory.fits:
        cure = (
            "smaller --batch.tokens or --model.dim, --tables.precision fp16, sampled candidates, or more machines; "
            f"{program('plan')} says what takes how much"
        )
        return Finding("error", "memory", f"does not fit: {text}", cure)
    return Finding("ok", "memory", text)


def _check_lengths(config: Doctor, contents: Contents) -> list[Finding]:
    share = contents.share_longer_than(config.model.max_len + 1)
    if share < CUT or config.batch.long_histories == "windows":
        return []
    text = (
        f"{share:.0%} of the histories are longer than --model.max_len {config.model.max_len}: older items are not read"
    )
    return [Finding("note", "lengths", text, "--batch.long_histories windows trains on all of them")]


def _check_precision(config: Doctor) -> list[Finding]:
    if config.train.precision == "tf32":
        return [Finding("error", "precision", "tf32 is for GPUs", "leave --train.precision out")]
    if config.train.precision == "bf16" and not any(name in cpu_flags() for name in BF16_FLAGS):
        text = "bf16 on a CPU without AVX512-BF16 or AMX is many times slower than fp32"
        return [Finding("warning", "precision", text, "leave --train.precision out")]
    return []
