"""`arpo-trl rollout RECIPE`: trajectories with real tools, their scores, and what is selected from them."""

import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console
from rich.text import Text
from tqdm import tqdm
from transformers.utils import logging

from ..data.tokenizer import load_template
from ..errors import RecipeError, RowError, RunFailed, printable
from ..model.base import uses_bf16_autocast
from ..model.model import load_model
from ..processes import leave_together, on_main_process
from ..recipe.keys import Recipe
from ..report.console import logged_to, say
from ..report.manifest import find_manifest, run_day
from ..run_folder import read_lines, save_metrics, to_lines, write_text
from ..terminal import start_bar
from .engines import Engine, Request, Sampling, TransformersEngine, load_for_generation
from .questions import form_of, read_questions
from .rollout_files import ROLLOUTS, append_lines, begin, finish, messages_column, part_path, to_row
from .rollout_scores import RIGHT, Line, describe, final_answer, is_well_formed, judge, score_answer, summarize
from .sandbox import Limits as ToolLimits
from .selection import select
from .server import ServerEngine
from .tags import RESULT, RESULT_END, Call
from .tools import Toolbox, Tools
from .trajectory import Limits, Trajectory, Writer

PARALLEL_TOOLS = 32
WAIT_FOR_OTHERS = timedelta(days=7)  # a process may take much longer than the others


def rollout(recipe: Recipe) -> None:
    """Roll out the questions of a recipe, score them, and select rows and pairs if they are training questions.

    Raises:
        RecipeError: the model, the questions or a tool is missing.
        RunFailed: the server or the device failed; the same command resumes.
    """
    logging.disable_progress_bar()
    folder = Path(recipe.output_dir)
    with logged_to(folder / "rollout.log", PartialState().process_index):
        say(*recipe.notices)
        _Rollout(recipe, folder).run()
        leave_together()


def sampling_of(recipe: Recipe) -> Sampling:
    """Return the sampling settings. Omitted ones are neutral: with LLaMA-Factory's defaults, samples are nearly identical."""
    values = {key: getattr(recipe, key) for key in ("temperature", "top_p", "top_k") if key in recipe.model_fields_set}
    do_sample = bool(recipe.do_sample) or recipe.num_generations > 1
    return Sampling(do_sample, repetition_penalty=recipe.repetition_penalty, seed=recipe.seed, **values)


def find_model(recipe: Recipe) -> str:
    """Return what is rolled out: the final model of a training recipe, else model_name_or_path.

    Raises:
        RecipeError: the training recipe has no final model yet.
    """
    if not recipe.do_train:
        return recipe.model_name_or_path
    folder = Path(recipe.output_dir)
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise recipe.error(
            "output_dir",
            f"{folder} has no final model. Train it first, or set do_train=false to roll out model_name_or_path",
        )
    return str(folder)


class _Rollout:
    """One command: what it rolls out, with what, and where the lines go."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe, self.folder, self.state = recipe, folder, PartialState()
        self.model_path = find_model(recipe)
        self.sampling = sampling_of(recipe)
        limits = ToolLimits(recipe.tool_timeout, recipe.tool_memory, output=recipe.max_tool_output)
        self.toolbox = Toolbox(recipe.tools, limits)
        if missing := self.toolbox.missing():
            raise recipe.error("tools", "; ".join(missing))
        loaded = recipe.model_copy(update={"model_name_or_path": self.model_path})
        self.template = load_template(loaded, run_day(recipe))
        self.tokenizer = self.template.tokenizer
        manifest = find_manifest(Path(self.model_path))
        form = form_of(manifest.results if manifest else None)
        self.questions, self.notices = read_questions(recipe, self.template, form)
        self.batch_size = recipe.per_device_eval_batch_size or recipe.per_device_train_batch_size
        self.bar: tqdm | None = None
        self.lock = threading.Lock()
        self.last: tuple[Trajectory, Line] | None = None

    def run(self) -> None:
        settings = self._settings()
        line, finished = on_main_process(lambda: begin(self.folder, settings))
        say(*self._describe(), *([line] if line else []))
        if not finished:
            self._generate()
            self.state.wait_for_everyone()
            if self.state.is_main_process:
                finish(self.folder, settings, self.state.num_processes)
        if self.state.is_main_process:
            self._report(read_lines(self.folder / ROLLOUTS))

    def _generate(self) -> None:
        engine, recipe = self._engine(), self.recipe
        limits = Limits(recipe.max_tool_calls, recipe.max_new_tokens, engine.context)
        writer = Writer(self.template, engine.ends, limits, self.toolbox.tools)
        part = part_path(self.folder, self.state.process_index)
        ordered = sorted(self._start(writer), key=lambda trajectory: -trajectory.prompt_tokens)
        size = 1 if recipe.server_url else self._batch_size(engine, ordered)
        batches = [ordered[at : at + size] for at in range(0, len(ordered), size)]
        mine = batches[self.state.process_index :: self.state.num_processes]
        done = self._resume(part, mine)
        waiting = [batch for batch in mine if not done.issuperset(trajectory.key for trajectory in batch)]
        total = sum(map(len, mine))
        self.bar = start_bar(total, total - sum(map(len, waiting))) if self.state.is_main_process else None
        with ThreadPoolExecutor(recipe.server_requests if recipe.server_url else PARALLEL_TOOLS) as tools:

            def complete(batch: Sequence[Trajectory]) -> None:
                roll_out(batch, engine, writer, self.toolbox, tools)
                self._save(part, batch, list(tools.map(partial(self._to_line, writer), batch)))

            if recipe.server_url:
                self._complete_in_parallel(complete, waiting, part)
            else:
                for batch in waiting:
                    complete(batch)
        if isinstance(engine, ServerEngine):
            engine.close()
        if self.bar:
            self.bar.close()
        if self.last and self.state.is_main_process:
            show("last trajectory", *self.last)

    def _start(self, writer: Writer) -> list[Trajectory]:
        """Return all trajectories. Questions that can't be rendered are skipped."""
        trajectories: list[Trajectory] = []
        skipped: list[str] = []
        for number, question in enumerate(self.questions):
            try:
                trajectories += [
                    writer.start(question, sample, number) for sample in range(self.recipe.num_generations)
                ]
            except RowError as error:
                skipped.append(f"{question.source}: {error}")
        if skipped:
            say(f"         {len(skipped):,} questions skipped, the first: {skipped[0]}")
        if not trajectories:
            raise RecipeError(f"{self.recipe.path}: no question can be rendered ({skipped[0]})")
        return trajectories

    def _complete_in_parallel(
        self, complete: Callable[[Sequence[Trajectory]], None], waiting: Sequence[Sequence[Trajectory]], part: Path
    ) -> None:
        """Complete each batch in its own thread; the first error cancels those that wait."""
        try:
            with ThreadPoolExecutor(self.recipe.server_requests) as pool:
                for _ in pool.map(complete, waiting):
                    pass
        except RunFailed as error:
            raise RunFailed(f"{error} ({len(read_lines(part)):,} trajectories are saved)") from None

    def _engine(self) -> Engine:
        path, recipe = self.model_path, self.recipe
        names = dict.fromkeys([*self.template.turn_ends, *self.template.stops])
        ends = [int(str(self.tokenizer.convert_tokens_to_ids(token))) for token in names]
        if recipe.server_url:
            server = ServerEngine(recipe.server_url, self.tokenizer, ends, self.sampling)
            say(
                f"server   {server.url}: {server.model}, context {server.context:,}",
                *(f"         {line}" for line in server.notices),
            )
            return server
        if not recipe.do_train and recipe.adapter_name_or_path:
            model = load_model(recipe)[0]
            model.to(self.state.device)
        else:
            model = load_for_generation(path, recipe.trust_remote_code)
        engine = TransformersEngine(model, self.tokenizer, self.sampling, uses_bf16_autocast(recipe))
        engine.ends = list(dict.fromkeys([*engine.ends, *ends]))
        return engine

    def _batch_size(self, engine: Engine, ordered: Sequence[Trajectory]) -> int:
        """Return the batch size, or 1 if padding changes what the model predicts."""
        assert isinstance(engine, TransformersEngine)
        error = 0.0 if self.batch_size == 1 else engine.padding_error(ordered[0].ids, ordered[-1].ids)
        if error <= engine.padding_tolerance:
            return self.batch_size
        say(f"batches  of one row: padded batches would change this model's logits by {error:.1%}")
        return 1

    def _resume(self, part: Path, batches: Sequence[Sequence[Trajectory]]) -> set[tuple[int, int]]:
        """Return the complete trajectories. Lines of an incomplete batch are removed, and the whole batch runs again."""
        lines = {(line["number"], line["sample"]): line for line in read_lines(part)}
        keys = [{trajectory.key for trajectory in batch} for batch in batches]
        complete = {key for batch in keys if lines.keys() >= batch for key in batch}
        if lines:
            write_text(part, to_lines([line for key, line in lines.items() if key in complete]))
            say(f"resumed  {len(complete):,} trajectories of this process are complete")
        return complete

    def _save(self, part: Path, batch: Sequence[Trajectory], lines: Sequence[Line]) -> None:
        with self.lock:
            append_lines(part, lines)
            if self.bar is not None:
                self.bar.update(len(batch))
            first, self.last = self.last is None, (batch[-1], lines[-1])
        if first and self.state.is_main_process:
            show("first trajectory", batch[0], lines[0])

    def _to_line(self, writer: Writer, trajectory: Trajectory) -> Line:
        """Score a trajectory, and return its line of rollouts.jsonl."""
        question, predicted = trajectory.question, final_answer(trajectory)
        if self.recipe.judge and trajectory.end != "environment":
            score = judge(self.recipe.judge, trajectory, self.toolbox.limits)
            if score is None:
                trajectory.end = "environment"
        else:
            score = score_answer(predicted, question.answer)
        row = to_row([*question.messages, *trajectory.messages], question.tools, question.formatting)
        return {
            "number": trajectory.number,
            "dataset": question.dataset,
            "source": question.source,
            "sample": trajectory.sample,
            "split": self.recipe.rollout_on,
            "formatting": question.formatting,
            **row,
            "prompt_messages": len(row[messages_column(question.formatting)]) - len(trajectory.messages),
            "answer": question.answer,
            "predicted": predicted,
            "score": score,
            "right": score is not None and score >= RIGHT,
            "well_formed": is_well_formed(trajectory),
            "end": trajectory.end,
            "tokens": trajectory.tokens,
            "prompt_tokens": trajectory.prompt_tokens,
            "total_tokens": len(trajectory.ids),
            "encoding": writer.encoding(trajectory),
            "rerendered": trajectory.rerendered,
            "calls": trajectory.calls,
        }

    def _settings(self) -> dict[str, Any]:
        """Return everything that decides the trajectories, to recognize the same rollout when it is resumed."""
        recipe = self.recipe
        keys = """rollout_on num_generations max_tool_calls max_new_tokens tools tool_timeout tool_memory max_tool_output
            judge server_url seed dataset eval_dataset val_size max_samples default_system template enable_thinking"""
        texts = "".join(f"{question.source} {question.digest} {question.answer}\n" for question in self.questions)
        weights = sorted(Path(self.model_path).glob("*.safetensors")) if Path(self.model_path).is_dir() else []
        return {
            **{key: recipe.model_dump(mode="json")[key] for key in keys.split()},
            "sampling": self.sampling._asdict(),
            "bf16": uses_bf16_autocast(recipe),
            "model": self.model_path,
            "weights": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in weights],
            "questions": hashlib.sha256(texts.encode(errors="replace")).hexdigest(),
            "batch_size": self.batch_size,
            "processes": self.state.num_processes,
        }

    def _describe(self) -> list[str]:
        recipe, total = self.recipe, len(self.questions) * self.recipe.num_generations
        forms = dict.fromkeys(str(question.form) for question in self.questions)
        first = f"rollout  {self.model_path}: {len(self.questions):,} questions ({recipe.rollout_on})"
        return [
            f"{first} x {recipe.num_generations} = {total:,} trajectories",
            *(f"         {notice}" for notice in self.notices),
            f"sampling  {self.sampling}; at most {recipe.max_new_tokens:,} tokens per reply, {recipe.max_tool_calls} tool calls",
            *(f"{'tools' if at == 0 else '':<8} {line}" for at, line in enumerate(self.toolbox.describe())),
            *self._describe_missing_tools(),
            f"results  {', '.join(forms)}",
        ]

    def _describe_missing_tools(self) -> list[str]:
        """Return a line for each tool that questions offer and the recipe does not run."""
        offered = Counter(
            name for question in self.questions for name in {tool["function"]["name"] for tool in question.tools or ()}
        )
        return [
            f"         {count:,} questions offer the tool {name}, and the recipe has no command for it: calls to it will fail. Set tools: {{{name}: COMMAND}}"
            for name, count in offered.items()
            if name not in self.toolbox.tools
        ]

    def _report(self, lines: list[Line]) -> None:
        names = dict.fromkeys(line["dataset"] for line in lines)
        columns = {name: summarize([line for line in lines if line["dataset"] == name]) for name in names}
        together = summarize(lines)
        figures = {f"rollout_{key}": value for key, value in together.items()}
        if len(columns) > 1:
            for name, column in columns.items():
                figures |= {f"rollout_{name}_{key}": value for key, value in column.items()}
            columns["all"] = together
        save_metrics(self.folder, "rollout", figures)
        ends = Counter(line["end"] for line in lines)
        say(f"rollout  {len(lines):,} trajectories are in {self.folder / ROLLOUTS}")
        say(*(f"         {line}" for line in describe(columns)))
        say(f"         finish reasons: {', '.join(f'{count:,} {end}' for end, count in sorted(ends.items()))}")
        if self.recipe.rollout_on == "train":
            say(*select(self.folder, self.recipe.max_per_question, self.recipe.max_pairs_per_question))


def roll_out(
    batch: Sequence[Trajectory], engine: Engine, writer: Writer, toolbox: Tools, pool: Executor | None = None
) -> None:
    """Advance all trajectories of a batch to their ends. Their tools run in parallel; the next replies wait for all."""
    active = [trajectory for trajectory in batch if trajectory.end is None]
    while active:
        requests = [to_request(trajectory, writer) for trajectory in active]
        calls = list(map(writer.accept, active, engine.generate(requests)))
        run = partial(_run_calls, writer, toolbox)
        for _ in pool.map(run, active, calls) if pool else map(run, active, calls):
            pass
        active = [trajectory for trajectory in active if trajectory.end is None]


def to_request(trajectory: Trajectory, writer: Writer) -> Request:
    """Return the request for a trajectory's next tokens. Its seed depends on its source, sample and calls alone."""
    question = trajectory.question
    inside = question.form.place == "inside"
    key = f"{question.dataset} {question.source} {trajectory.sample} {len(trajectory.ids)}"
    stops = tuple(f"</{tag}>" for tag in writer.tags) if inside else ()
    return Request(trajectory.ids, writer.tokens_left(trajectory), key, stops)


def _run_calls(writer: Writer, toolbox: Tools, trajectory: Trajectory, calls: Sequence[Call]) -> None:
    """Run the calls of a reply in order and append their results."""
    if not calls:
        return
    try:
        writer.add_results(trajectory, calls, list(map(toolbox.run, calls)))
    except (OSError, RowError):
        writer.fail(trajectory)


def show(title: str, trajectory: Trajectory, line: Line) -> None:
    """Print a trajectory: the model's text green, results yellow, the question dim."""
    console = Console(highlight=False, soft_wrap=True)
    score = "no expected answer" if line["score"] is None else f"score {line['score']:g}"
    say(f"{title}: {line['source']}, sample {line['sample']}, {score}, finish reason {line['end']}")
    text = Text()
    for message in [*trajectory.question.messages, *trajectory.messages]:
        if message["role"] != "assistant":
            style = "yellow" if message in trajectory.messages else "dim"
            text.append(f"{message['role']}: {printable(message['content'])}\n", style)
            continue
        for piece in message["content"].split(RESULT):
            inside, end, after = piece.rpartition(RESULT_END)
            text.append(printable(f"{RESULT}{inside}{end}") if end else "", "yellow")
            text.append(printable(after), "green")
        for call in message.get("tool_calls", ()):
            text.append(printable(f"\n{call['function']}"), "green")
        text.append("\n")
    with tqdm.external_write_mode():
        console.print(text)
