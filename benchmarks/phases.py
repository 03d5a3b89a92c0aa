"""Who runs what beside whom: contenders of a phase are alive together and take turns."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bars import OURS, OVER_GRPC, PEFT, VLLM, VLLM_LORA
from contender import Contender, ContenderError
from paths import HERE, Places
from peers.protocol import Batch, Outcome, Spec
from records import Record, Results, first_token, per_token
from venvs import PEERS, interpreter
from workloads import OUTPUT_TOKENS, WORKLOADS, Workload, adapter_folders
from workloads import REGISTERED as COUNTS

LLAMA, PEFT_SERIAL = "llama.cpp", "transformers-peft-serial"
OWN_SCRIPTS = {OURS: "in_process.py", OVER_GRPC: "over_grpc.py"}
WARM_TOKENS = 8  # of prompt and of answer, in the short warm-up

Say = Callable[[str], None]


@dataclass(slots=True, frozen=True)
class Entry:
    """A contender and, by workload, how often it runs it. full_warm_up: every workload once as it
    is, else a short batch on all adapters and one request: for those who take minutes."""

    contender: str
    repeats: Mapping[str, int]
    full_warm_up: bool = True

    def workloads(self) -> list[Workload]:
        return [WORKLOADS[name] for name in self.repeats]


@dataclass(slots=True, frozen=True)
class Bench:
    """What every phase needs."""

    model: Path
    vocab: int
    places: Places
    results: Results
    say: Say

    def command(self, contender: str) -> list[str]:
        """The interpreter and the script; a peer's virtual environment is made if need be."""
        if contender in OWN_SCRIPTS:
            return [interpreter(None, self.places), str(HERE / OWN_SCRIPTS[contender])]
        peer = PEERS[contender]
        return [interpreter(peer, self.places, self.say), str(HERE / "peers" / peer.script)]

    def spec(self, entry: Entry) -> Spec:
        """What the contender must be ready for, to run all of the entry's workloads."""
        workloads = entry.workloads()
        ranks = max((w.ranks for w in workloads), key=len)
        folders = adapter_folders(ranks, self.model, self.places.adapters)
        return Spec(
            model=str(self.model),
            scratch=str(self.places.scratch(entry.contender)),
            adapters=[str(folder) for folder in folders],
            max_rank=max(ranks, default=0),
            resident=min(len(ranks), max(w.resident for w in workloads)),
        )

    def start(self, entry: Entry, spec: Spec) -> Contender:
        self.say(f"{entry.contender}: starting")
        contender = Contender.start(entry.contender, self.command(entry.contender), spec)
        told = ", ".join(f"{name} {value}" for name, value in contender.about.items())
        self.say(f"{entry.contender}: ready in {contender.start_seconds:.1f} s ({told})")
        return contender


def run_phase(bench: Bench, entries: Sequence[Entry]) -> list[str]:
    """Starts all, warms them up, and runs their workloads in turns.

    Returns what went wrong: a contender that fails is left out from then on.
    """
    failures: list[str] = []
    running: dict[int, Contender] = {}

    def give_up(number: int, error: Exception) -> None:
        bench.say(f"failed: {error}")
        failures.append(str(error))
        if contender := running.pop(number, None):
            contender.stop()

    try:
        for number, entry in enumerate(entries):
            try:
                running[number] = bench.start(entry, bench.spec(entry))
                _warm_up(bench, entry, running[number])
            except (ContenderError, subprocess.CalledProcessError) as error:
                give_up(number, error)
        for number, name, repeat in turns(entries):
            if number in running:
                try:
                    run_once(bench, running[number], WORKLOADS[name], repeat)
                except ContenderError as error:
                    give_up(number, error)
    finally:
        for contender in running.values():
            contender.stop()
    return failures


def run_once(bench: Bench, contender: Contender, workload: Workload, repeat: int) -> None:
    outcome = contender.run(batch_of(workload, bench.vocab))
    record = record_of(contender, workload.name, repeat, outcome)
    bench.results.add(record)
    bench.say(
        f"{contender.name}: {workload.name} {record.tokens_per_second:.0f} tokens/s"
        f" in {record.seconds:.1f} s"
    )


def record_of(contender: Contender, workload: str, repeat: int, outcome: Outcome) -> Record:
    return Record(
        contender.name,
        workload,
        repeat,
        outcome.seconds,
        outcome.tokens,
        first_token(outcome),
        per_token(outcome),
        contender.peak_bytes(),
        contender.about.get("server_seconds", contender.start_seconds),
    )


def batch_of(workload: Workload, vocab: int) -> Batch:
    return Batch(workload.prompts(vocab), list(workload.picks), OUTPUT_TOKENS)


def turns(entries: Sequence[Entry]) -> list[tuple[int, str, int]]:
    """(entry, workload, repeat), round by round: each workload by all contenders in a row, every
    other round the other way."""
    names = list(dict.fromkeys(name for entry in entries for name in entry.repeats))
    rounds = max(max(entry.repeats.values()) for entry in entries)
    order: list[tuple[int, str, int]] = []
    for repeat in range(rounds):
        turn = [
            (number, name, repeat)
            for name in names
            for number, entry in enumerate(entries)
            if entry.repeats.get(name, 0) > repeat
        ]
        order += turn if repeat % 2 == 0 else turn[::-1]
    return order


def _warm_up(bench: Bench, entry: Entry, contender: Contender) -> None:
    for workload in entry.workloads():
        whole = batch_of(workload, bench.vocab)
        if entry.full_warm_up:
            contender.run(whole)
            continue
        short = [prompt[:WARM_TOKENS] for prompt in whole.prompts]
        contender.run(Batch(short, whole.picks, WARM_TOKENS))
        contender.run(Batch(whole.prompts[:1], whole.picks[:1], WARM_TOKENS))
    bench.say(f"{entry.contender}: warm")


QUICK = (
    Entry(OURS, {"single-base": 3, "single-adapter": 3, "base-32": 3, "distinct-32": 3}),
    Entry(OVER_GRPC, {"distinct-32": 3}),
)

RANK_16 = (
    Entry(
        OURS,
        {
            **{"single-base": 5, "single-adapter": 5, "base-32": 5, "shared-32": 3},
            **{"distinct-32": 5, "distinct-8": 2},
        },
    ),
    Entry(
        OVER_GRPC,
        {
            **{"single-base": 3, "single-adapter": 3, "base-32": 3, "shared-32": 2},
            "distinct-32": 5,
        },
    ),
    Entry(VLLM, {"single-base": 5, "base-32": 3}),
    Entry(VLLM_LORA, {"single-adapter": 2, "distinct-32": 2}, full_warm_up=False),
    Entry(
        PEFT,
        {"single-base": 2, "single-adapter": 2, "base-32": 2, "distinct-32": 2},
        full_warm_up=False,
    ),
    Entry(PEFT_SERIAL, {"distinct-8": 2}, full_warm_up=False),
    Entry(LLAMA, {"single-base": 2, "base-32": 2}, full_warm_up=False),
)

MIXED = (
    Entry(OURS, {"mixed-rank-32": 3}),
    Entry(OVER_GRPC, {"mixed-rank-32": 2}),
    Entry(VLLM_LORA, {"mixed-rank-32": 2}, full_warm_up=False),
)

ZIPF = (
    Entry(OURS, {"zipf-128": 2}, full_warm_up=False),
    Entry(OURS, {"zipf-128-roomy": 2}, full_warm_up=False),
    Entry(OVER_GRPC, {"zipf-128": 2}, full_warm_up=False),
)

REGISTERED = tuple(Entry(OURS, {f"registered-{count}": 2}, full_warm_up=False) for count in COUNTS)
