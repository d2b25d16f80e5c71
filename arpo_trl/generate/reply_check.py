"""Compare a server's replies with the folder's own, after the tokens of training: what differs here is the weights.

Log-probabilities are compared where the server gives them. Where it gives only text, the first token that differs counts only
if its gap to the runner-up is larger than rounding explains.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from ..data.saved_folder import end_ids
from ..data.serving_causes import Difference
from ..data.serving_rows import ServingRow
from ..errors import RecipeError
from ..model.model import through_end
from ..report.manifest import find_manifest
from ..run_folder import list_checkpoints
from .reference import DTYPES, Reference, Scores, load_reference
from .server_protocols import Reply, Server

REPLY_TOKENS = 32
TRAINED_TOKENS = 128  # scored of each trained reply
END_ROWS = 4
QUANTIZED_BITS = 15.0
FEW_ROWS = 8  # with which other weights are tried
AS_NEAR = 1.5  # times the least distance
OWN_LOSS = 5.0
"""Times the reference's own mean loss in a dtype that a server may lose, which rounds more than matrix products.

Untouched servers lost 0.5 to 3.6 times as much; docs/measurements.md#serving.
"""


class Limit(NamedTuple):
    """Nats by which untouched models differ: mean and largest difference of a token, and the gap of two candidates."""

    mean: float
    most: float
    gap: float


# Three to ten times what untouched models of up to 135 M parameters showed (docs/measurements.md#serving). A model whose own
# scores are moved further by rounding is reported.
LIMITS = {
    "float32": Limit(1e-4, 2e-3, 2e-3),
    "float16": Limit(2e-3, 0.1, 0.05),
    "bfloat16": Limit(4e-2, 1.5, 0.5),
}
QUANTIZED = Limit(0.5, 10.0, 3.0)


class Distance(NamedTuple):
    """How far a server's scores are from a reference's, over `tokens` of `rows`; `gap`: of the worst first difference."""

    mean: float
    most: float
    gap: float
    other_rows: int
    rows: int
    tokens: int

    def within(self, limit: Limit) -> bool:
        """Return whether rounding explains the distance; it never explains NaN."""
        return self.mean <= limit.mean and self.most <= limit.most and self.gap <= limit.gap


class Sample(NamedTuple):
    """A reply to compare: the server's own, or a trained one that it scored (`reply` is None)."""

    context: list[int]
    ids: list[int] | None
    log_probs: list[float]
    reply: Reply | None


@dataclass
class ReplyCheck:
    """The check's parts, and what it found.

    Attributes:
        dtype: What the server computes in, where the user gives it.
        matched: The weights with which the server is compared.
        losses: What computing in a dtype costs this model: mean and largest difference of a token's log-probability.
    """

    server: Server
    reference: Reference
    tokenizer: PreTrainedTokenizerBase
    dtype: str | None = None
    distance: Distance | None = None
    matched: str = ""
    losses: dict[str, tuple[float, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)

    @property
    def ends(self) -> list[int]:
        """The ids that end a reply of the folder."""
        own = end_ids(Path(self.reference.name))
        return list(dict.fromkeys([self.tokenizer.eos_token_id, *sorted(own)]))

    def summary(self) -> str:
        """The comparison in one line."""
        distance = self.distance
        if distance is None:
            return ""
        same = f"{distance.rows - distance.other_rows} of {distance.rows} greedy replies identical"
        if not distance.tokens:
            return same
        return f"{same}; log-probabilities of {distance.tokens:,} tokens differ by {distance.mean:.1e} nats on average, {distance.most:.1e} at most, compared with {self.matched}"


def check_replies(check: ReplyCheck, rows: Sequence[ServingRow]) -> None:
    """Compare replies after the ids of training, and the end of trained replies. Raises ServerError."""
    samples = _ask_server(check.server, rows, check.ends)
    if not samples:
        check.notes.append("the server takes no token ids: replies are compared through the chat alone")
        return
    _judge(check, samples)
    _check_runs_on(check, samples)
    # Another model ends its replies elsewhere.
    if not any(difference.cause == "wrong model" for difference in check.differences):
        _check_ends(check, rows)


def _ask_server(server: Server, rows: Sequence[ServingRow], ends: list[int]) -> list[Sample]:
    """Ask for the greedy reply of each row, and for the scores of its trained reply."""

    def ask(row: ServingRow) -> list[Sample]:
        samples = []
        if reply := server.complete(row.ids, REPLY_TOKENS):
            ids = reply.ids and through_end(reply.ids, ends)[: len(reply.log_probs) or None]
            samples.append(Sample(row.ids, ids, reply.log_probs, reply))
        trained = row.reply_ids[:TRAINED_TOKENS]
        if scores := server.score([*row.ids, *trained], len(row.ids)):
            samples.append(Sample(row.ids, trained, scores, None))
        return samples

    with ThreadPoolExecutor(4) as pool:
        return [sample for samples in pool.map(ask, rows) for sample in samples]


def measure(check: ReplyCheck, samples: Iterable[Sample], dtype: str) -> Distance:
    """Compare the server's samples with the reference rounded to `dtype`."""
    check.reference.round_to(dtype)
    differences: list[float] = []
    gaps: list[float | None] = []
    for sample in samples:
        if sample.ids is None:
            gaps.append(_gap_of_text(check, sample))
        else:
            scores = check.reference.score(sample.context, sample.ids)
            differences += [abs(ours - other) for ours, other in zip(sample.log_probs, scores.log_probs)]
            if sample.reply:
                gaps.append(_gap_of_ids(sample, scores))
    others = [gap for gap in gaps if gap is not None]
    mean, most = sum(differences) / max(len(differences), 1), max(differences, default=0.0)
    if any(map(math.isnan, (*differences, *others))):  # max() would lose it
        mean = most = math.inf
    return Distance(mean, most, max(others, default=0.0), len(others), len(gaps), len(differences))


def _gap_of_ids(sample: Sample, scores: Scores) -> float | None:
    """The gap at the first token that the reference would not have written, the smaller of both sides; None without one."""
    assert sample.ids is not None and sample.reply
    for at, (token, best) in enumerate(zip(sample.ids, scores.best)):
        if token != best:
            gap = scores.best_log_probs[at] - scores.log_probs[at]
            places = sample.reply.candidates
            if at < len(places) and places[at]:
                lowest = min(places[at].values())
                gap = min(gap, max(places[at].get(token, lowest), lowest) - places[at].get(best, lowest - 1.0))
            return max(gap, 0.0)
    return None


def _gap_of_text(check: ReplyCheck, sample: Sample) -> float | None:
    """The same for a server that gives text alone: the gap of the reference's token to its runner-up."""
    assert sample.reply
    own = check.reference.reply(sample.context, REPLY_TOKENS, check.ends)
    text = _visible(check.tokenizer, own)
    ended = bool(own) and own[-1] in check.ends
    if text == sample.reply.text or (ended and sample.reply.text.startswith(text)):
        return None
    if not ended and text.startswith(sample.reply.text) and not sample.reply.stopped:
        return None  # a character that is not complete yet
    shared = max(at for at in range(len(own) + 1) if sample.reply.text.startswith(_visible(check.tokenizer, own[:at])))
    at = min(shared, len(own) - 1)
    scores = check.reference.score(sample.context, own)
    return scores.best_log_probs[at] - scores.second_log_probs[at]


def _visible(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text).rstrip("\ufffd")


# --- the end of a reply ---


def _check_runs_on(check: ReplyCheck, samples: Sequence[Sample]) -> None:
    """A reply that continues after its end-of-turn token: the server does not stop there."""
    for sample in samples:
        reply = sample.reply
        if reply and reply.ids and sample.ids and sample.ids[-1] in check.ends and len(reply.ids) > len(sample.ids):
            check.differences.append(_runs_on(check, sample.ids[-1], "a reply continues after it"))
            return


def _check_ends(check: ReplyCheck, rows: Sequence[ServingRow]) -> None:
    """Let the server write the last token of trained replies, where the reference does: it has to stop there."""
    tried = 0
    for row in rows:
        if tried == END_ROWS:
            return
        context = [*row.ids, *row.reply_ids[:-1]]
        scores = check.reference.score(context, [row.end])
        if scores.best[0] != row.end or scores.best_log_probs[0] - scores.second_log_probs[0] < 1.0:
            continue
        tried += 1
        reply = check.server.complete(context, 8)
        if reply is None:
            return
        if reply.stopped and reply.tokens <= 1:
            continue
        is_known = any(difference.cause == "end-of-turn token" for difference in check.differences)
        if not is_known and (not reply.ids or reply.ids[0] == row.end):
            check.differences.append(_runs_on(check, row.end, f"it writes {reply.tokens} tokens there"))
        return
    if not tried:
        check.notes.append("the end of a reply could not be tried: the model does not end any of the trained replies")


def _runs_on(check: ReplyCheck, end: int, difference: str) -> Difference:
    name = check.tokenizer.convert_ids_to_tokens(end)
    return Difference(
        "end-of-turn token",
        f"the server does not stop at {name!r} ({end}): {difference}",
        f'Write "eos_token_id": {check.ends} into the served generation_config.json (GGUF: convert again), or send '
        f"stop_token_ids: [{end}].",
    )


# --- the weights ---


def _judge(check: ReplyCheck, samples: list[Sample]) -> None:
    """Find the dtype in which the reference scores what the server does; else say what else it may serve."""
    reference, own, few = check.reference, check.reference.dtype, samples[: 2 * FEW_ROWS]
    measured: dict[str, Distance] = {}
    for dtype in _list_dtypes(check):
        measured[dtype] = measure(check, few, dtype)
        if measured[dtype].within(LIMITS["float32"]):
            break
    least = min(distance.mean for distance in measured.values())
    nearest = sorted(measured, key=lambda dtype: measured[dtype].mean > AS_NEAR * least)  # else the likeliest first
    dtype = next((dtype for dtype in nearest if _is_rounding(check, few, dtype, measured[dtype])), own)
    check.distance = measure(check, samples, dtype)
    check.matched = f"weights in {dtype}" if dtype == own else f"weights rounded to {dtype}"
    bits = check.server.bits
    if _is_rounding(check, few, dtype, check.distance):
        if dtype != own:
            _report_rounding(check, dtype, measure(check, few, own))
    elif bits is not None and bits < QUANTIZED_BITS and check.distance.within(QUANTIZED):
        check.notes.append(
            f"the server is quantized ({bits:.1f} bits a weight): its replies are not held to a limit of a dtype"
        )
    else:
        check.differences.append(_explain_weights(check, samples))
    reference.round_to(own)


def _list_dtypes(check: ReplyCheck) -> list[str]:
    """The dtypes that may be served, the likeliest first."""
    own, bits = check.reference.dtype, check.server.bits
    first = check.dtype or own
    if bits is not None and QUANTIZED_BITS <= bits < 17 and first == "float32":
        first = "float16"
    # Weights in half precision are what they are in float32.
    return [dtype for dtype in dict.fromkeys([first, own, *DTYPES]) if dtype == own or dtype != "float32"]


def _is_rounding(check: ReplyCheck, few: Sequence[Sample], dtype: str, distance: Distance) -> bool:
    """Return whether rounding explains a distance.

    What a dtype costs differs from model to model by a factor of 100, so that the limit is this model's own loss in it.
    """
    computed = _computed_in(check.server, dtype)
    limit = LIMITS[computed]
    if computed == "float32" or not any(sample.ids for sample in few):
        return distance.within(limit)
    if computed not in check.losses:
        check.losses[computed] = _own_loss(check.reference, few, computed)
    mean, most = check.losses[computed]
    return distance.within(Limit(OWN_LOSS * mean, max(limit.most, OWN_LOSS * most), max(limit.gap, OWN_LOSS * most)))


def _own_loss(reference: Reference, few: Sequence[Sample], dtype: str) -> tuple[float, float]:
    """Return the mean and the largest difference of the reference's scores from its own with matrix products in `dtype`."""
    losses: list[float] = []
    for sample in few:
        if sample.ids:
            exact, rough = (reference.score(sample.context, sample.ids, name) for name in ("float32", dtype))
            losses += [abs(precise - rounded) for precise, rounded in zip(exact.log_probs, rough.log_probs)]
    return sum(losses) / len(losses), max(losses)


def _computed_in(server: Server, dtype: str) -> str:
    """Return the coarser of the weights' dtype and the one that the server computes in whatever the weights are."""
    return max(filter(None, (dtype, server.computes_in)), key=lambda name: LIMITS[name].mean)


def _report_rounding(check: ReplyCheck, dtype: str, moved: Distance) -> None:
    """The server serves rounded weights: a note, unless rounding moves this model's scores more than it does others'."""
    note = (
        f"rounding the weights to {dtype} (the folder has {check.reference.dtype}) changes log-probabilities by {moved.mean:.1e} on"
        f" average, {moved.most:.1e} at most"
    )
    if moved.within(LIMITS[dtype]):
        check.notes.append(note)
    else:
        fix = "Merge with --dtype float32, or train and serve in the same dtype."
        check.differences.append(Difference("merge rounding", note, fix))


def _explain_weights(check: ReplyCheck, samples: list[Sample]) -> Difference:
    """The folder's weights in no dtype give the server's replies: try the base, its checkpoints, and what the server tells."""
    distance = check.distance
    assert distance is not None
    size = f"log-probabilities differ by {distance.mean:.1e} on average, {distance.most:.1e} at most"
    if not distance.tokens:
        size = f"{distance.other_rows} of {distance.rows} greedy replies differ, by up to {distance.gap:.2g} nats"
    if not math.isfinite(distance.mean) and (difference := overflow(check.reference, "its replies are not numbers")):
        return difference
    fix = f"Serve {check.reference.name}."
    for name, what in _other_models(Path(check.reference.name)):
        try:
            other = load_reference(name)
        except RecipeError:
            continue
        tried = ReplyCheck(check.server, other, check.tokenizer)
        for dtype in dict.fromkeys([other.dtype, *DTYPES]):
            if measure(tried, samples[: 2 * FEW_ROWS], dtype).within(LIMITS[_computed_in(check.server, dtype)]):
                return Difference("wrong model", f"the server serves {what}, {name}; {size}", fix)
    own, theirs = check.reference.model.num_parameters(), check.server.parameters
    if theirs and abs(theirs - own) > own // 100:
        return Difference("wrong model", f"the server's has {theirs:,} parameters, this folder's {own:,}; {size}", fix)
    return Difference(
        "wrong model",
        f"after the same tokens {size}, in every dtype: the server's weights are not this folder's"
        f" (it names them {check.server.model})",
        fix,
    )


def overflow(reference: Reference, symptom: str) -> Difference | None:
    """Explain what a server does by weights that float16 cannot hold; None if there are none."""
    lost = reference.overflows("float16")
    if not lost:
        return None
    text = f"float16 cannot hold {lost:,} weights of this model; the server: {symptom}"
    return Difference("merge rounding", text, "Merge with --dtype float32 or bfloat16.")


def _other_models(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield models that may be served instead: what was trained from, and the run's checkpoints."""
    if manifest := find_manifest(folder):
        trained_from = str(manifest.recipe["model_name_or_path"])
        if Path(trained_from).is_dir():
            yield trained_from, "the model before training"
        run = Path(str(manifest.recipe["output_dir"]))
        if (run / "tokenizer_config.json").is_file() and run.resolve() != folder.resolve():
            yield str(run), "the run's own folder"
    yield from ((str(path), "a checkpoint of the run") for path in list_checkpoints(folder))
