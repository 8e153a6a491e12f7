"""Text tasks with written-out answers, generated from a seed.

Every sample has a `question` that ends in a newline and an `answer` that shows its working and ends in `#### RESULT`, the
convention of GSM8K (Cobbe et al., 2021). Lists are written with spaces so that every element is a token.
"""

import random
import string
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

NAMES = ["Tom", "Anna", "Ben", "Mia", "Sam", "Lucy", "Max", "Ella", "Leo", "Nora"]
ITEMS = ["apples", "books", "coins", "cards", "pens", "eggs", "shells", "stamps"]
Task = Callable[[random.Random], tuple[str, str]]  # makes a question and its answer


@dataclass(frozen=True)
class Sample:
    """Prompt and completion; `question + answer` is the whole text."""

    task: str
    question: str
    answer: str


def _worked(*steps: str, result: object) -> str:
    return f"{', '.join(steps)}\n#### {result}" if steps else f"#### {result}"


def _word_problem(rng: random.Random) -> tuple[str, str]:
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    a, b, c = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 20)
    kind = rng.randrange(6)
    if kind == 0:
        d = rng.randint(1, a * b)
        story = f"{name} has {a} boxes with {b} {item} in each and gives {d} away. How many {item} are left?"
        return story, _worked(f"{a} * {b} = {a * b}", f"{a * b} - {d} = {a * b - d}", result=a * b - d)
    if kind == 1:
        story = f"{name} has {c} {item} and buys {a} bags of {b} {item}. How many {item} are there now?"
        return story, _worked(f"{a} * {b} = {a * b}", f"{c} + {a * b} = {c + a * b}", result=c + a * b)
    if kind == 2:
        total = a * b
        story = f"{name} shares {total} {item} among {a} friends. Each friend then gets {c} more. How many has each?"
        return story, _worked(f"{total} / {a} = {b}", f"{b} + {c} = {b + c}", result=b + c)
    if kind == 3:
        d = rng.randint(1, c)
        story = f"{name} finds {c} {item}, loses {d} and then finds {a} times what is left. How many were found last?"
        return story, _worked(f"{c} - {d} = {c - d}", f"{c - d} * {a} = {(c - d) * a}", result=(c - d) * a)
    if kind == 4:
        other = rng.choice([n for n in NAMES if n != name])
        story = f"{name} has {c} {item}. {other} has {a} more than {name}. How many {item} do they have together?"
        return story, _worked(f"{c} + {a} = {c + a}", f"{c} + {c + a} = {2 * c + a}", result=2 * c + a)
    price = rng.randint(2, 9)
    story = f"{name} sells {a} {item} for {price} each on Monday and {b} on Tuesday. How much money is that?"
    return story, _worked(f"{a} + {b} = {a + b}", f"{a + b} * {price} = {(a + b) * price}", result=(a + b) * price)


def _addition(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(10, 999), rng.randint(10, 999)
    steps, carry = [], 0
    for place in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**place % 10, b // 10**place % 10
        steps.append(f"{x} + {y} + {carry} = {x + y + carry}")
        carry = (x + y + carry) // 10
    return f"What is {a} + {b}?", _worked(*steps, result=a + b)


def _subtraction(rng: random.Random) -> tuple[str, str]:
    a, b = sorted((rng.randint(10, 999), rng.randint(10, 999)), reverse=True)
    steps, borrow = [], 0
    for place in range(len(str(a))):
        x, y = a // 10**place % 10, b // 10**place % 10
        need = x - y - borrow < 0
        steps.append(f"{x + 10 * need} - {y} - {borrow} = {x + 10 * need - y - borrow}")
        borrow = int(need)
    return f"What is {a} - {b}?", _worked(*steps, result=a - b)


def _multiplication(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(11, 99), rng.randint(2, 9)
    low, high = a % 10 * b, a // 10 * 10 * b
    steps = f"{a % 10} * {b} = {low}", f"{a // 10 * 10} * {b} = {high}", f"{high} + {low} = {a * b}"
    return f"What is {a} * {b}?", _worked(*steps, result=a * b)


def _modulo(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(10, 199), rng.randint(2, 12)
    q = a // b
    return f"What is {a} mod {b}?", _worked(f"{q} * {b} = {q * b}", f"{a} - {q * b} = {a % b}", result=a % b)


def _letters(rng: random.Random, low: int, high: int, alphabet: str = string.ascii_lowercase) -> list[str]:
    return [rng.choice(alphabet) for _ in range(rng.randint(low, high))]


def _of_letters(request: str, most: int, solve: Callable[[list[str]], Iterable[str]]) -> Task:
    """Task whose answer is `solve` of four to `most` letters."""

    def make(rng: random.Random) -> tuple[str, str]:
        letters = _letters(rng, 4, most)
        return f"{request}: {' '.join(letters)}", _worked(result=" ".join(solve(letters)))

    return make


def _counting(rng: random.Random) -> tuple[str, str]:
    letters = _letters(rng, 5, 12, rng.choice(["abc", "xyz", "klm", "pqr"]))
    wanted = rng.choice(letters)
    tally = [f"{wanted} {i + 1}" for i in range(letters.count(wanted))]
    return f"Count {wanted}: {' '.join(letters)}", _worked(*tally, result=len(tally))


def _maximum(rng: random.Random) -> tuple[str, str]:
    numbers = [rng.randint(10, 99) for _ in range(rng.randint(3, 6))]
    running = [str(max(numbers[: i + 1])) for i in range(len(numbers))]
    return f"Maximum: {' '.join(map(str, numbers))}", _worked(" ".join(running), result=max(numbers))


TASKS: dict[str, Task] = {
    "word_problem": _word_problem,
    "addition": _addition,
    "subtraction": _subtraction,
    "multiplication": _multiplication,
    "modulo": _modulo,
    "reversing": _of_letters("Reverse", 8, reversed),
    "sorting": _of_letters("Sort", 7, sorted),
    "counting": _counting,
    "upper_casing": _of_letters("Upper case", 8, lambda letters: map(str.upper, letters)),
    "maximum": _maximum,
}
STRINGS = ("reversing", "sorting", "counting", "upper_casing", "maximum")  # the tasks without arithmetic


def generate(seed: int, exclude: frozenset[str] = frozenset()) -> Iterator[Sample]:
    """Endless samples of all tasks in turn, without the questions in `exclude`. The same seed gives the same samples."""
    rng = random.Random(seed)
    while True:
        for task, make in TASKS.items():
            while True:
                question, answer = make(rng)
                if question + "\n" not in exclude:
                    break
            yield Sample(task, question + "\n", answer)
