"""Write the toy training sets: ShareGPT conversations that reason, call tools and box an answer, in two forms.

    python scripts/make_toy_dataset.py                              # the shipped file: 500 rows in turns
    python scripts/make_toy_dataset.py --form inside --rows 60      # the other shipped file
    python scripts/make_toy_dataset.py --pairs --rows 120           # preference pairs for stage: dpo; --form inside --rows 40
    python scripts/make_toy_dataset.py --source ARPO-SFT-54K.json   # the first 500 rows of the real set

In `turns` each result is a separate turn, as in ARPO's setup guide. In `inside` one gpt turn holds the whole trajectory,
results included, as in ARPO-SFT-54K; there a search returns complete pages, which makes about 9 KB a row, as in that set.

Generated rows depend on the seed alone. Every <python> block is executed (in a subprocess with a time limit) and its
<result> is what it printed; every <search> searches the small gazetteer below. The gazetteer is fictional: a model
trained on these rows learns the form of such a conversation, but no facts about the world.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parents[1] / "recipes" / "data"
TOY_DATA = DATA / "arpo_sft_toy.jsonl"
TOY_DATA_INSIDE = DATA / "arpo_sft_toy_inside.jsonl"
TOY_PAIRS = DATA / "arpo_dpo_toy.jsonl"
TOY_PAIRS_INSIDE = DATA / "arpo_dpo_toy_inside.jsonl"
LONGEST_PAIR = 2000  # characters of a row whose trajectory becomes a pair
TIME_LIMIT = 20  # seconds for one <python> block; they take 0.05, so a row that reaches it has a bug in its task

# After https://github.com/RUC-NLPIR/ARPO, whose prompt names the same tags.
SYSTEM = (
    "You are a helpful assistant that solves a question step by step with the help of a search tool and a python "
    "interpreter. First think about the reasoning process within <think> </think>. To look something up, write a query "
    "within <search> </search>; to compute, write a program within <python> </python>. What the tool returns is given "
    "to you within <result> </result>, and you may call tools as often as you need. In the end, write the final answer "
    "within <answer> </answer>, with the exact value in \\boxed{}."
)


@dataclass
class Row:
    """One conversation: a question, rounds of (call, result, result with full pages), and an answer."""

    question: str
    rounds: list[tuple[str, str, str]] = field(default_factory=list)
    last: str = ""

    def python(self, reasoning: str, code: str) -> str:
        result = run_python(code)
        self.rounds.append((f"<think>{reasoning}</think>\n<python>\n{code}\n</python>", result, result))
        return result

    def search(self, reasoning: str, query: str) -> None:
        call = f"<think>{reasoning}</think>\n<search>{query}</search>"
        self.rounds.append((call, search(query), search(query, top=5, full_pages=True)))

    def answer(self, reasoning: str, value: object) -> Row:
        self.last = f"<think>{reasoning}</think>\n<answer>The final answer is \\[ \\boxed{{{value}}} \\]</answer>"
        return self

    def to_dict(self, form: str) -> dict[str, Any]:
        turns = [("human", self.question)]
        if form == "inside":
            rounds = [f"{call} <result>\n{pages}\n</result>\n" for call, _, pages in self.rounds]
            turns.append(("gpt", "".join([*rounds, self.last])))
        else:
            for call, result, _ in self.rounds:
                turns += [("gpt", call), ("human", f"<result>\n{result}\n</result>")]
            turns.append(("gpt", self.last))
        return {"conversations": [{"from": who, "value": text} for who, text in turns], "system": SYSTEM}


@functools.cache
def run_python(code: str) -> str:
    """Return what a program prints and, if it fails, the last line of its traceback (the rest differs between Pythons)."""
    command = [sys.executable, "-I", "-S", "-X", "utf8", "-c", code]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=TIME_LIMIT)
    return (done.stdout + "".join(done.stderr.strip().splitlines()[-1:])).strip()


# The gazetteer


@dataclass(frozen=True)
class Town:
    name: str
    province: str
    river: str
    founder: str
    year: int
    people: int
    craft: str


def names(rng: random.Random, count: int) -> list[str]:
    starts = ["Al", "Bre", "Cor", "Da", "El", "Fen", "Gal", "Hol", "Is", "Ka", "Lo", "Mar", "Nor", "Or", "Pel", "Ru"]
    middles = ["da", "le", "mi", "no", "ra", "si", "to", "va", "we", "yo", ""]
    ends = ["ck", "den", "fell", "gard", "lin", "mont", "nar", "rith", "stow", "th", "vik", "wen"]
    every = ["".join(parts) for parts in itertools.product(starts, middles, ends)]
    return rng.sample(every, count)


def make_gazetteer() -> tuple[list[Town], dict[str, int], dict[str, int], list[tuple[str, str]]]:
    """Return towns, birth years by person, lengths in km by river, and pages as (title, text)."""
    rng = random.Random("gazetteer")
    drawn = iter(names(rng, 200))
    provinces = [next(drawn) for _ in range(6)]
    rivers = {f"River {next(drawn)}": rng.randrange(60, 900) for _ in range(12)}
    crafts = "glass boats cheese bells paper clocks maps saffron wool amber tiles kites".split()
    towns, births, pages = [], {}, []
    for _ in range(48):
        person = f"{next(drawn)} {next(drawn)}"
        born = rng.randrange(1100, 1800)
        births[person] = born
        town = Town(
            name=next(drawn),
            province=rng.choice(provinces),
            river=rng.choice(list(rivers)),
            founder=person,
            year=born + rng.randrange(22, 60),
            people=rng.randrange(2_000, 90_000),
            craft=rng.choice(crafts),
        )
        towns.append(town)
        pages.append(
            (
                town.name,
                f"{town.name} is a town in the province of {town.province}, on the {town.river}. It was founded in "
                f"{town.year} by {person}. It has {town.people} inhabitants and is known for its {town.craft}. "
                + rng.choice(
                    [
                        "A market is held on the old bridge every second week.",
                        "Most of its houses were rebuilt in stone after a flood.",
                        "The town hall keeps the longest unbroken weather record of the isles.",
                        "A ferry links it with the other bank.",
                    ]
                ),
            )
        )
        trade = rng.choice(["a navigator", "a mason", "a physician", "a weaver", "an astronomer", "a judge"])
        pages.append(
            (
                person,
                f"{person}, born in {born} in {rng.choice(towns).name}, was {trade} who founded the town of "
                f"{town.name} and died in {born + rng.randrange(61, 90)}.",
            )
        )
    for river, length in rivers.items():
        banks = ", ".join(town.name for town in towns if town.river == river) or "no town of note"
        pages.append((river, f"The {river} is {length} km long and flows past {banks}."))
    for province in provinces:
        members = ", ".join(town.name for town in towns if town.province == province)
        pages.append((province, f"{province} is a province of the isles. Its towns are {members}."))
    return towns, births, rivers, pages


TOWNS, BIRTHS, RIVERS, PAGES = make_gazetteer()
STOP_WORDS = set(
    "a an and by did does for how in is it many name of on the to town was what when where which who".split()
)


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower())) - STOP_WORDS


MORE = {  # Filler of the full pages. No question is about it, and searches ignore it.
    "town": """{name} lies {few}0 m above the sea, where two old roads meet.
The wall of {name} had {few} gates, of which one is left.
A fire in {year} spared only the quarter at the water.
The school was opened in {year}, at first with {few} pupils and a single teacher.
Its library holds {n} volumes, most of them bequeathed by a ship's captain.
In winter the river freezes for about {few} weeks, and sledges take the place of carts.
The bakers, the smiths and the dyers had guilds of their own until {year}.
A bell of {n} kilograms hangs in the tower and is rung at dusk.
The mill below the weir was rebuilt in {year} after the third flood in a decade.
Every year a fair of {few} days is held when the harvest is in.
Visitors come for the gardens on the northern slope, laid out in {year}.
The oldest house is an inn, which still has {few} rooms and a stable.
A stone bridge of {few} arches replaced the ferry in {year}.
The archive of the town hall begins in {year} with a list of debts.
Its arms show a heron above three waves.
An observatory worked here for {few} years, until its lens was sold.""",
    "person": """The eldest of {few} children, {name} learnt to read from a neighbour's almanac.
A journey of {few} years led as far as the southern capes.
Letters that were found in {year} show a lasting quarrel with the customs office.
{name} wrote {few} books, of which one is known by its title only.
A portrait, painted late in life, hangs in the hall of the province.
The marriage remained without children; a nephew inherited the house and {n} crowns.
A street, a lighthouse and a breed of pear bear the name of {name}.
In {year} the grave was moved to the new cemetery.
Contemporaries praised a sharp memory and complained of a sharper tongue.
A diary of {n} pages covers only {few} winters.""",
    "place": """The first survey was made in {year} and took {few} summers.
Otters, herons and {few} kinds of trout are counted among its animals.
Old maps draw it too far to the north, an error repeated until {year}.
Its upper part is woodland, its lower part meadows and orchards.
In {year} the water stood {few} m above the mark for nine days.
A path for walkers follows it over {n} bends.
Salt, timber and slate were carried through it for {few} centuries.
The treaty of {year} settled who may build weirs and who may fish.
A legend tells of a drowned bell that is heard before a storm.
Painters of the last century came for its light in autumn.""",
}


def page_text(kind: str, name: str, lead: str) -> str:
    """Return a full page: its first paragraph, and two paragraphs of random filler."""
    rng = random.Random(f"page/{name}")
    sentences = [
        line.format(name=name, n=rng.randrange(40, 9000), few=rng.randrange(3, 14), year=rng.randrange(1500, 1990))
        for line in rng.sample(MORE[kind].splitlines(), 10)
    ]
    return "\n".join([lead, " ".join(sentences[:5]), " ".join(sentences[5:])])


def search(query: str, top: int = 2, full_pages: bool = False) -> str:
    """Return the pages that share most words with the query (words of the title count three times)."""
    wanted = words(query)
    scores = [3 * len(wanted & words(title)) + len(wanted & words(text)) for title, text in PAGES]
    best = sorted(range(len(PAGES)), key=lambda page: -scores[page])[:top]
    found = [PAGES[page] for page in best if scores[page]]
    if full_pages:
        found = [(title, page_text(kind_of(title), title, text)) for title, text in found]
    return "\n".join(f'Page {n}: "{title}"\n{text}' for n, (title, text) in enumerate(found, 1)) or "No page found."


def kind_of(title: str) -> str:
    return "town" if title in {town.name for town in TOWNS} else "person" if title in BIRTHS else "place"


# The tasks: each draws a question and solves it


def addition(rng: random.Random) -> Row:
    """Numbers copied from the question into a call, and from its result into the answer: a tiny model can learn it."""
    a, b = rng.randint(2, 99), rng.randint(2, 99)
    value = (row := Row(f"What is {a} + {b}?")).python("I let Python add.", f"print({a} + {b})")
    return row.answer(f"The result is {value}.", value)


def arithmetic(rng: random.Random) -> Row:
    a, b, c = rng.randint(12, 999), rng.randint(12, 999), rng.randint(3, 99)
    sign, name = rng.choice([("+", "sum"), ("-", "difference"), ("*", "product")])
    row = Row(
        rng.choice(
            [
                f"What is the {name} of {a} and {b}, multiplied by {c}?",
                f"Take the {name} of {a} and {b} and multiply it by {c}. What do you get?",
                f"Multiply the {name} of {a} and {b} by {c}.",
            ]
        )
    )
    value = row.python(f"I compute the {name} first and then multiply by {c}.", f"print(({a} {sign} {b}) * {c})")
    return row.answer(f"The interpreter gives {value}.", value)


def chinese(rng: random.Random) -> Row:
    boxes, each, gone = rng.randint(12, 90), rng.randint(6, 48), rng.randint(5, 60)
    fruit = rng.choice(["苹果", "橘子", "梨", "桃子"])
    row = Row(f"商店有{boxes}箱{fruit}，每箱{each}个，卖掉了{gone}个，还剩多少个{fruit}？")
    value = row.python(f"先算{fruit}的总数，再减去卖掉的数量。", f"print({boxes} * {each} - {gone})")
    return row.answer(f"计算结果是{value}，所以还剩{value}个{fruit}。", value)


def prime_sum(rng: random.Random) -> Row:
    low = rng.randint(10, 400)
    high = low + rng.randint(20, 120)
    row = Row(
        rng.choice(
            [
                f"What is the sum of all prime numbers between {low} and {high}?",
                f"Add up every prime p with {low} <= p <= {high}.",
            ]
        )
    )
    code = (
        "def is_prime(n):\n"
        "    return n > 1 and all(n % d for d in range(2, int(n ** 0.5) + 1))\n\n"
        f"primes = [n for n in range({low}, {high} + 1) if is_prime(n)]\n"
        "print(primes)\nprint(sum(primes))"
    )
    primes, value = row.python(f"I list the primes from {low} to {high} and add them.", code).splitlines()
    count = len(json.loads(primes))
    return row.answer(f"There are {count} such primes and their sum is {value}.", value)


def power_remainder(rng: random.Random) -> Row:
    base, exponent, modulus = rng.randint(2, 50), rng.randint(50, 5000), rng.randint(7, 997)
    row = Row(f"What is the remainder when {base}^{exponent} is divided by {modulus}?")
    value = row.python(
        "Python's pow takes a modulus, so the huge power is never written out.",
        f"print(pow({base}, {exponent}, {modulus}))",
    )
    if rng.random() < 0.5:
        code = f"r = 1\nfor _ in range({exponent}):\n    r = r * {base} % {modulus}\nprint(r)"
        row.python(f"It prints {value}. I check it with a plain loop.", code)
        return row.answer(f"Both ways give {value}.", value)
    return row.answer(f"The remainder is {value}.", value)


def letters(rng: random.Random) -> Row:
    phrase = " ".join(town.name for town in rng.sample(TOWNS, rng.randint(2, 5))).lower()
    letter = rng.choice(sorted(set(phrase) - {" "}))
    row = Row(f'How many times does the letter "{letter}" occur in "{phrase}"?')
    value = row.python(
        "Counting by eye is error-prone, so I let Python count.", f'print("{phrase}".count("{letter}"))'
    )
    return row.answer(f'The letter "{letter}" occurs {value} times.', value)


def two_equations(rng: random.Random) -> Row:
    x, y = rng.randint(-12, 20), rng.randint(-12, 20)
    a, b, c, d = (rng.randint(2, 15) for _ in range(4))
    if a * d == b * c:
        d += 1
    row = Row(f"Solve {a}x + {b}y = {a * x + b * y} and {c}x + {d}y = {c * x + d * y}. What is x + y?")
    code = (
        "from fractions import Fraction\n"
        f"a, b, e = {a}, {b}, {a * x + b * y}\n"
        f"c, d, f = {c}, {d}, {c * x + d * y}\n"
        "det = a * d - b * c\n"
        "x = Fraction(e * d - b * f, det)\ny = Fraction(a * f - e * c, det)\n"
        "print(x, y, x + y)"
    )
    value = row.python("Two linear equations: Cramer's rule with exact fractions.", code).split()
    return row.answer(f"x = {value[0]} and y = {value[1]}, so x + y = {value[2]}.", value[2])


def weekday(rng: random.Random) -> Row:
    year, month, day, later = rng.randint(1900, 2099), rng.randint(1, 12), rng.randint(1, 28), rng.randint(30, 2000)
    row = Row(f"Which day of the week is {later} days after {year}-{month:02}-{day:02}?")
    code = (
        "from datetime import date, timedelta\n"
        f"later = date({year}, {month}, {day}) + timedelta(days={later})\n"
        'days = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]\n'
        "print(later, days[later.weekday()])"
    )
    date, name = row.python(f"I add {later} days to the date and read off the weekday.", code).split()
    return row.answer(f"The date is {date}, a {name}.", name)


def dice(rng: random.Random) -> Row:
    count, sides = rng.choice([(2, 6), (3, 6), (4, 6), (2, 8), (3, 8), (2, 12), (3, 10), (2, 20)])
    total = rng.randint(count + 2, count * sides - 2)
    row = Row(f"{count} fair dice with {sides} sides are rolled. What is the probability that the sum is {total}?")
    code = (
        "from fractions import Fraction\nfrom itertools import product\n\n"
        f"rolls = list(product(range(1, {sides + 1}), repeat={count}))\n"
        f"hits = sum(sum(roll) == {total} for roll in rolls)\n"
        "print(hits, len(rolls), Fraction(hits, len(rolls)))"
    )
    hits, rolls, value = row.python("There are few enough rolls to try them all.", code).split()
    return row.answer(f"{hits} of {rolls} rolls have the sum {total}, which is {value}.", value)


def shopping(rng: random.Random) -> Row:
    things = rng.sample(["pens", "maps", "lamps", "bells", "kites", "cups", "clocks", "books"], rng.randint(2, 4))
    bought = [(rng.randint(2, 30), thing, rng.randint(1, 40)) for thing in things]
    paid = rng.choice([1000, 2000, 5000])
    items = ", ".join(f"{count} {thing} at {price} crowns each" for count, thing, price in bought)
    who = rng.choice(["Ada", "Bo", "Chen", "Dina", "Emeka", "Farah"])
    row = Row(f"{who} buys {items} and pays with {paid} crowns. How much change does {who} get?")
    code = "total = " + " + ".join(f"{count} * {price}" for count, _, price in bought) + f"\nprint({paid} - total)"
    value = row.python("I add up the prices and subtract the total from what was paid.", code)
    if int(value) < 0:
        return row.answer(f"The result is negative: {paid} crowns are not enough, {-int(value)} are missing.", value)
    return row.answer(f"{who} gets {value} crowns back.", value)


def median(rng: random.Random) -> Row:
    numbers = [rng.randint(1, 500) for _ in range(rng.randint(7, 40))]
    what = rng.choice(["median", "mean"])
    row = Row(f"What is the {what} of {', '.join(map(str, numbers))}? Round to two decimals.")
    code = f'from statistics import {what}\n\nnumbers = {numbers}\nprint(len(numbers), f"{{{what}(numbers):.2f}}")'
    count, value = row.python(f"The statistics module has {what}.", code).split()
    return row.answer(f"Of the {count} numbers, the {what} is {value}.", value)


def digits(rng: random.Random) -> Row:
    number = rng.randint(100, 9999)
    name, code = rng.choice(
        [
            ("the digit sum of 2^{n}", "print(sum(map(int, str(2 ** {n}))))"),
            ("the number of digits of {n}!", "from math import factorial\n\nprint(len(str(factorial({n}))))"),
            ("{n} in binary", 'print(f"{{{n}:b}}")'),
            ("{n} in hexadecimal", 'print(f"{{{n}:x}}")'),
            ("the number of divisors of {n}", "print(sum({n} % d == 0 for d in range(1, {n} + 1)))"),
        ]
    )
    if "!" in name:
        number //= 10
    row = Row(f"What is {name.format(n=number)}?")
    value = row.python("This is a direct computation.", code.format(n=number))
    return row.answer(f"The program prints {value}.", value)


def collatz(rng: random.Random) -> Row:
    start = rng.randint(3, 2000)
    row = Row(f"Start at {start}; halve even numbers, and replace odd n by 3n + 1. How many steps is it to 1?")
    code = (
        f"n, path = {start}, []\nwhile n != 1:\n    n = n // 2 if n % 2 == 0 else 3 * n + 1\n    path.append(n)\n"
        "print(path)\nprint(len(path))"
    )
    value = row.python("I follow the path and count.", code).splitlines()[-1]
    return row.answer(f"The path to 1 has {value} steps.", value)


def second_attempt(rng: random.Random) -> Row:
    """The first program fails; the second fixes the error."""
    numbers = [rng.randint(10, 99) for _ in range(rng.randint(4, 12))]
    text = " ".join(map(str, numbers))
    asked, wrong, reasoning, right = rng.choice(
        [
            (
                f'What is the sum of the numbers in "{text}"?',
                f'numbers = "{text}".split()\nprint(sum(numbers))',
                "The parts are still strings. I turn them into integers first.",
                f'numbers = "{text}".split()\nprint(sum(map(int, numbers)))',
            ),
            (
                f"How often does the most frequent number occur in {text}?",
                f"counts = {{}}\nfor n in {numbers}:\n    counts[n] += 1\nprint(max(counts.values()))",
                "The key is not there when a number is met for the first time. I use get with a default.",
                f"counts = {{}}\nfor n in {numbers}:\n    counts[n] = counts.get(n, 0) + 1\nprint(max(counts.values()))",
            ),
            (
                f"What is the largest difference between neighbours in {text}?",
                f"n = {numbers}\nprint(max(abs(n[i] - n[i + 1]) for i in range(len(n))))",
                "The last number has no right neighbour, so the loop must end one earlier.",
                f"n = {numbers}\nprint(max(abs(n[i] - n[i + 1]) for i in range(len(n) - 1)))",
            ),
            (
                f"What is the largest number in {text}, written in words of single digits joined by dashes?",
                f'names = "zero one two three four five six seven eight nine".split()\n'
                f'print("-".join(names[d] for d in str(max({numbers}))))',
                "The digits of a string are characters; as indices they have to be integers.",
                f'names = "zero one two three four five six seven eight nine".split()\n'
                f'print("-".join(names[int(d)] for d in str(max({numbers}))))',
            ),
        ]
    )
    row = Row(asked)
    error = row.python(rng.choice(["I write a short program.", "Python can do this."]), wrong)
    value = row.python(f"That failed with {error.split(':')[0]}. {reasoning}", right)
    return row.answer(f"Now it works and gives {value}.", value)


def one_search(rng: random.Random) -> Row:
    town = rng.choice(TOWNS)
    asked, query, value = rng.choice(
        [
            (f"Who founded {town.name}?", f"{town.name} founded", town.founder),
            (f"In which province is {town.name}?", f"{town.name} province", town.province),
            (f"What is the town of {town.name} known for?", f"{town.name} known for", town.craft),
            (f"How many inhabitants does {town.name} have?", f"{town.name} inhabitants", town.people),
            (f"When was {town.name} founded?", f"{town.name} founded", town.year),
            (f"How long is the {town.river}?", f"{town.river} long", f"{RIVERS[town.river]} km"),
        ]
    )
    row = Row(asked)
    row.search(rng.choice(["I do not know this, so I look it up.", "I need to search for this."]), query)
    return row.answer(f"The first page says it: {value}.", value)


def two_searches(rng: random.Random) -> Row:
    town = rng.choice(TOWNS)
    asked, reasoning, query, value = rng.choice(
        [
            (
                f"In which year was the founder of {town.name} born?",
                f"{town.name} was founded by {town.founder}. Now I need the year of birth.",
                f"{town.founder} born",
                BIRTHS[town.founder],
            ),
            (
                f"How many kilometres long is the river that {town.name} lies on?",
                f"{town.name} lies on the {town.river}. Now I need its length.",
                f"{town.river} length",
                RIVERS[town.river],
            ),
            (
                f"How many towns are in the province in which {town.name} lies?",
                f"{town.name} lies in {town.province}. Now I need the list of its towns.",
                f"{town.province} province towns",
                sum(other.province == town.province for other in TOWNS),
            ),
        ]
    )
    row = Row(asked)
    row.search(f"First I have to find the page about {town.name}.", town.name)
    row.search(reasoning, query)
    return row.answer(f"From the second search, the answer is {value}.", value)


def search_then_compute(rng: random.Random) -> Row:
    towns = rng.sample(TOWNS, rng.choice([2, 2, 3]))
    listed = ", ".join(town.name for town in towns[:-1]) + " and " + towns[-1].name
    asked, fact, code = rng.choice(
        [
            ("How many people live in {} together?", "people", "print(sum({}))"),
            (
                "How many years lie between the oldest and the youngest founding of {}?",
                "year",
                "print(max({0}) - min({0}))",
            ),
        ]
    )
    row = Row(asked.format(listed))
    known: list[int] = []
    for town in towns:
        last = f" {known[-1]} is the first number." if len(known) == 1 else f" I have {known} so far." if known else ""
        row.search(f"I need the page about {town.name}.{last}", f"{town.name} town")
        known.append(getattr(town, fact))
    value = row.python(f"The numbers are {known}.", code.format(known))
    return row.answer(f"The result is {value}.", value)


def nothing_found(rng: random.Random) -> Row:
    """The first query is too vague; the second names the thing."""
    town = rng.choice(TOWNS)
    row = Row(f"Which goods is {town.name} famous for?")
    row.search("I search for the goods.", rng.choice(["famous goods", "local specialities", "best products to buy"]))
    row.search("Nothing was found. I search for the name of the town instead.", f"{town.name} known for")
    return row.answer(f"{town.name} is known for its {town.craft}.", town.craft)


def no_tool(rng: random.Random) -> Row:
    a, b = rng.randint(2, 12), rng.randint(2, 12)
    asked, reasoning, value = rng.choice(
        [
            (f"What is {a} times {b}?", f"{a} times {b} is {a * b}; no tool is needed.", a * b),
            (
                f"A square has sides of {a * b} cm. What is its perimeter in cm?",
                f"Four sides of {a * b} cm make {4 * a * b} cm.",
                4 * a * b,
            ),
            (
                f"Write the list {a}, {b}, {a + b} in descending order.",
                "I only have to sort three numbers.",
                ", ".join(map(str, sorted([a, b, a + b], reverse=True))),
            ),
        ]
    )
    return Row(asked).answer(reasoning, value)


def long_table(rng: random.Random) -> Row:
    """A program that prints far more than it should: these rows exceed 4,096 tokens."""
    low = rng.randint(100, 900)
    high = low + rng.randint(420, 800)
    row = Row(
        f"For every n from {low} to {high}, take n^2 mod 97 and n^3 mod 89. For how many n is the first the larger one?"
    )
    code = (
        f"count = 0\nfor n in range({low}, {high} + 1):\n    a, b = n ** 2 % 97, n ** 3 % 89\n    count += a > b\n"
        "    print(n, a, b)\nprint(count)"
    )
    value = row.python("I print the whole table to see what is going on, then the count.", code).splitlines()[-1]
    return row.answer(f"The last line of the table is the count, {value}.", value)


def long_reading(rng: random.Random) -> Row:
    """Many rounds: every town of a list is looked up."""
    towns = rng.sample(TOWNS, rng.randint(4, 20))
    row = Row(f"Which of these towns has the most inhabitants: {', '.join(town.name for town in towns)}?")
    row.search("There are many towns. I look them up one after the other.", f"{towns[0].name} inhabitants")
    for before, town in itertools.pairwise(towns):
        row.search(f"{before.name} has {before.people} inhabitants. Next is {town.name}.", f"{town.name} inhabitants")
    known = {town.name: town.people for town in towns}
    value = row.python(
        f"{towns[-1].name} has {towns[-1].people}. I compare.", f"people = {known}\nprint(max(people, key=people.get))"
    )
    return row.answer(f"With {known[value]} inhabitants, {value} is the largest.", value)


TASKS: dict[Callable[[random.Random], Row], int] = {
    addition: 14,
    arithmetic: 12,
    chinese: 4,
    prime_sum: 7,
    power_remainder: 7,
    letters: 6,
    two_equations: 6,
    weekday: 6,
    dice: 5,
    shopping: 7,
    median: 6,
    digits: 6,
    collatz: 4,
    second_attempt: 9,
    one_search: 12,
    two_searches: 10,
    search_then_compute: 8,
    nothing_found: 4,
    no_tool: 6,
    long_table: 3,
    long_reading: 8,
}


SEARCHES: dict[Callable[[random.Random], Row], int] = {
    one_search: 40,
    two_searches: 100,
    search_then_compute: 160,
    nothing_found: 30,
    long_reading: 20,
}


def generate(rows: int, seed: int, form: str = "turns") -> Iterator[dict[str, Any]]:
    """Yield rows. Each row has its own random stream, so that a shorter set is the beginning of a longer one.

    In the form `inside`, as in ARPO-SFT-54K, more rows search than compute.
    """
    tasks = TASKS | SEARCHES if form == "inside" else TASKS
    asked: set[str] = set()
    for index in range(rows):
        for attempt in itertools.count():
            rng = random.Random(f"{seed}/{index}/{attempt}")
            [task] = rng.choices(list(tasks), weights=list(tasks.values()))
            row = task(rng)
            if row.question not in asked:
                break
        asked.add(row.question)
        yield row.to_dict(form)


def generate_pairs(rows: int, seed: int, form: str = "turns") -> Iterator[dict[str, Any]]:
    """Yield ranking rows: the right trajectory, and one with a guessed answer, half of them after a wrong call.

    In the form `turns` a side is a list of turns, in the form `inside` one turn that holds the whole trajectory.
    """
    short = (row for row in generate(sys.maxsize, seed, form) if len(str(row["conversations"])) < LONGEST_PAIR)
    for index, row in enumerate(itertools.islice(short, rows)):
        rng = random.Random(f"{seed}/{index}/pair")
        question, *chosen = row["conversations"]
        guess = (
            f"<think>I guess.</think>\n<answer>The final answer is \\[ \\boxed{{{rng.randint(2, 99)}}} \\]</answer>"
        )
        turns = [guess]
        if call := re.match(r"(.*?)<(python|search)>(.*?)</\2>", chosen[0]["value"], re.DOTALL):
            other = "search" if call[2] == "python" else "python"
            if index % 2:
                turns = [f"{call[1]}<{other}>{call[3]}</{other}>", "<result>\nNothing found.\n</result>", guess]
        if form == "inside":
            turns = [" ".join(turns)]
        rejected = [{"from": ("gpt", "human")[at % 2], "value": text} for at, text in enumerate(turns)]
        sides = (
            {"chosen": chosen[0], "rejected": rejected[0]}
            if form == "inside"
            else {"chosen": chosen, "rejected": rejected}
        )
        yield {"system": row["system"], "conversations": [question], **sides}


def first_rows(source: Path, rows: int) -> list[dict[str, Any]]:
    """Return the first rows of a JSON list or of a JSON Lines file, whatever its name."""
    with source.open(encoding="utf-8-sig") as lines:
        is_list = lines.read(100).lstrip().startswith("[")
        lines.seek(0)
        found: Iterator[dict[str, Any]] = (
            iter(json.load(lines)) if is_list else map(json.loads, filter(str.strip, lines))
        )
        return list(itertools.islice(found, rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="take the first rows of this .json or .jsonl file")
    parser.add_argument(
        "--form", choices=["turns", "inside"], default="turns", help="where the results of tools are (turns)"
    )
    parser.add_argument("--out", type=Path, help="the .jsonl file to write (default: the shipped file of that form)")
    parser.add_argument("--pairs", action="store_true", help="write preference pairs, for stage: dpo")
    parser.add_argument("--rows", type=int, default=500, help="number of rows (500)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the generated rows")
    args = parser.parse_args()
    if args.rows < 1:
        parser.error(f"--rows: found {args.rows}, expected 1 or more")
    shipped = {("turns", False): TOY_DATA, ("inside", False): TOY_DATA_INSIDE}
    shipped |= {("turns", True): TOY_PAIRS, ("inside", True): TOY_PAIRS_INSIDE}
    out = args.out or shipped[args.form, args.pairs]
    if args.pairs and args.source:
        parser.error("--source: not supported with --pairs")
    make = generate_pairs if args.pairs else generate
    try:
        rows = first_rows(args.source, args.rows) if args.source else list(make(args.rows, args.seed, args.form))
    except (OSError, ValueError) as error:
        parser.error(f"--source: {args.source}: {error}; expected a JSON list or JSON Lines")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(text.encode())
    print(f"{out}: {len(rows)} rows, {len(text.encode()) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
