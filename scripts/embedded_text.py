"""Everything the embedded default is made from: pre-training text and word problems, in English and Chinese, by seed.

A *situation* is the shared root of both: a setup with numbers, a sentence that works it out, and a question. The
pre-training text tells it as a short story, at times with the question in it. A problem is a turn of a conversation,
answered in the form of GSM8K (worked sentence, then ``#### N``): the pre-training text shows neither, its
conversations are small talk, whatever is asked in them.
"""

import dataclasses
import random
from collections.abc import Callable, Iterator

SMALLEST = 2  # a story never counts one thing, so plurals stay right
LARGEST_ADDEND = 20
LARGEST_FACTOR = 9
ENDOFTEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('unknown role: ' + message['role']) -}}"
    "{%- endif -%}"
    f"{{{{- '{IM_START}' + message['role'] + '\\n' + message['content'] + '{IM_END}\\n' -}}}}"
    "{%- endfor -%}"
    f"{{%- if add_generation_prompt -%}}{{{{- '{IM_START}assistant\\n' -}}}}{{%- endif -%}}"
)


def _words(en: str, zh: str) -> dict[str, list[str]]:
    return {"en": en.split(), "zh": zh.split()}


NAMES = _words("Tom Anna Ben Mia Sam Lily Max Nora Leo Rosa Jack Emma", "小明 小红 小华 小丽 小刚 小芳 小强 小美")
ITEMS = _words(
    "apples pears books pens eggs cards coins shells stamps balls cups flowers",
    "苹果 梨 橘子 鸡蛋 球 杯子 贝壳 玩具 盘子 石头",
)
PLACES = _words("market park school garden kitchen station", "市场 公园 学校 花园 厨房 车站")
DAYS = _words(
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday", "星期一 星期二 星期三 星期四 星期五 星期六 星期天"
)
COLOURS = _words("red blue green yellow white black", "红色 蓝色 绿色 黄色 白色 黑色")
WEATHER = _words("warm cold sunny windy", "暖和 寒冷 晴朗 有风")
BELOW_TWENTY, TENS = (
    line.split()
    for line in """zero one two three four five six seven eight nine ten eleven twelve thirteen \
fourteen fifteen sixteen seventeen eighteen nineteen
twenty thirty forty fifty sixty seventy eighty ninety""".splitlines()
)
DIGITS_ZH = "零一二三四五六七八九"


@dataclasses.dataclass(frozen=True)
class Situation:
    """One kind of event; ``steps`` are operations over a, b, c and x (the first result); ``{e}`` is the last step."""

    language: str
    steps: tuple[str, ...]
    setup: str
    worked: str
    question: str


def _situations(language: str, table: str) -> list[Situation]:
    rows = [[cell.strip() for cell in line.split("|")] for line in table.strip().splitlines()]
    return [Situation(language, tuple(steps.split(";")), *cells) for steps, *cells in rows]


# steps | setup | worked sentence | question
SITUATIONS = _situations(
    "en",
    """
a+b | {n} has {a} {i}. {m} gives {n} {b} more. | Now {n} has {e} {i}. | How many {i} does {n} have now?
a+b | {n} has {a} {i} and buys {b} more at the {p}. | {n} has {e} {i}. | How many {i} does {n} have?
a+b | There are {a} {i} in a box. {n} puts {b} more into it. | The box holds {e} {i}. | How many {i} does the box hold?
a+b | {n} finds {a} {i} on {d} and {b} on {f}. | {n} finds {e} {i}. | How many {i} does {n} find in all?
a+b | {n} has {a} {i} and {m} has {b} {i}. | Together they have {e} {i}. | How many {i} do they have together?
a-b | {n} has {a} {i}. {n} gives {b} to {m}. | {n} has {e} {i} left. | How many {i} does {n} have left?
a-b | {n} takes {a} {i} to the {p} and loses {b} of them. | {n} keeps {e} {i}. | How many {i} does {n} keep?
a-b | There are {a} {i} in a box. {n} takes {b} out. | The box still holds {e} {i}. | How many {i} are still in the box?
a-b | {n} has {a} {i} and {m} has only {b}. | {n} has {e} more {i}. | How many more {i} does {n} have than {m}?
a-b | {n} wants {a} {i} but has only {b}. | {n} still needs {e} {i}. | How many {i} does {n} still need?
a*b | {n} has {a} bags with {b} {i} in each bag. | There are {e} {i}. | How many {i} are there?
a*b | One box holds {b} {i}. {n} buys {a} boxes. | {n} buys {e} {i}. | How many {i} does {n} buy?
a*b | {n} finds {b} {i} every day for {a} days. | {n} finds {e} {i}. | How many {i} does {n} find?
a*b | {n} sells {a} {i} for {b} coins each. | {n} gets {e} coins. | How many coins does {n} get?
a+b;x-c | {n} has {a} {i}, buys {b} more and gives {m} {c}. | {n} keeps {e} {i}. | How many {i} does {n} keep?
a-b;x+c | {n} has {a} {i}, loses {b} and finds {c} more. | {n} ends with {e} {i}. | How many {i} does {n} end with?
a*b;x+c | {n} has {a} bags of {b} {i} and {c} more. | {n} has {e} {i} in all. | How many {i} does {n} have in all?
""",
) + _situations(
    "zh",
    """
a+b | {n}有{a}个{i}，{m}又给了{n}{b}个。 | {n}现在有 {e} 个{i}。 | {n}现在有多少个{i}？
a+b | {n}有{a}个{i}，在{p}又买了{b}个。 | {n}有 {e} 个{i}。 | {n}有多少个{i}？
a+b | 盒子里有{a}个{i}，{n}又放进{b}个。 | 盒子里有 {e} 个{i}。 | 盒子里有多少个{i}？
a+b | {n}{d}找到{a}个{i}，{f}找到{b}个。 | {n}找到 {e} 个{i}。 | {n}一共找到多少个{i}？
a+b | {n}有{a}个{i}，{m}有{b}个{i}。 | 他们一共有 {e} 个{i}。 | 他们一共有多少个{i}？
a-b | {n}有{a}个{i}，给了{m}{b}个。 | {n}还有 {e} 个{i}。 | {n}还有多少个{i}？
a-b | {n}带着{a}个{i}去{p}，丢了{b}个。 | {n}剩下 {e} 个{i}。 | {n}剩下多少个{i}？
a-b | 盒子里有{a}个{i}，{n}拿走{b}个。 | 盒子里还有 {e} 个{i}。 | 盒子里还有多少个{i}？
a-b | {n}有{a}个{i}，{m}只有{b}个。 | {n}多 {e} 个{i}。 | {n}比{m}多多少个{i}？
a-b | {n}想要{a}个{i}，只有{b}个。 | {n}还要 {e} 个{i}。 | {n}还要多少个{i}？
a*b | {n}有{a}个袋子，每个袋子里有{b}个{i}。 | 一共有 {e} 个{i}。 | 一共有多少个{i}？
a*b | 一盒有{b}个{i}，{n}买了{a}盒。 | {n}买了 {e} 个{i}。 | {n}买了多少个{i}？
a*b | {n}每天找到{b}个{i}，找了{a}天。 | {n}找到 {e} 个{i}。 | {n}找到多少个{i}？
a*b | {n}卖了{a}个{i}，每个{b}元。 | {n}得到 {e} 元。 | {n}得到多少元？
a+b;x-c | {n}有{a}个{i}，又买了{b}个，再给{m}{c}个。 | {n}留下 {e} 个{i}。 | {n}最后留下多少个{i}？
a-b;x+c | {n}有{a}个{i}，丢了{b}个，又找到{c}个。 | {n}最后有 {e} 个{i}。 | {n}最后有多少个{i}？
a*b;x+c | {n}有{a}袋{i}，每袋{b}个，另外还有{c}个。 | {n}总共有 {e} 个{i}。 | {n}总共有多少个{i}？
""",
)

# Replies tell something small; none of them answers a question with a sum.
SMALL_TALK = {
    "en": """
Hello! | Hello, nice to see you.
How are you? | I am fine, thank you. It is {w} today.
Good morning, {n}. | Good morning! I am going to the {p}.
What is your name? | My name is {n}. I live near the {p}.
What colour do you like? | I like {c}. My {i} are {c} too.
Tell me about {n}. | {n} lives near the {p} and likes {c} {i}. On {d} {n} walks there with {m}.
What did you do on {d}? | I met {m} at the {p}. We looked at the {i} and talked.
Can you tell me a story? | On a {w} {d} {n} went to the {p}. {m} was there with some {c} {i}. They were happy.
Where are the {i}? | The {i} are in the {p}. {n} put them there on {d}.
How many friends does {n} have? | {n} has many friends. On {d} they meet at the {p}.
Does {n} have any {i}? | {n} has some {c} {i} at home and some more at the {p}.
""",
    "zh": """
你好！ | 你好，很高兴见到你。
你好吗？ | 我很好，谢谢。今天很{w}。
早上好，{n}。 | 早上好！我要去{p}。
你叫什么名字？ | 我叫{n}，我住在{p}旁边。
你喜欢什么颜色？ | 我喜欢{c}，我的{i}也是{c}的。
说说{n}吧。 | {n}住在{p}旁边，喜欢{c}的{i}。{d}{n}和{m}去那里走走。
{d}你做了什么？ | 我在{p}见到了{m}，我们看了{i}，说了很多话。
讲个故事好吗？ | 在一个{w}的{d}，{n}去了{p}。{m}带着{c}的{i}也在那里，他们很高兴。
{i}在哪里？ | {i}在{p}，是{n}{d}放的。
{n}有多少朋友？ | {n}有很多朋友，{d}他们在{p}见面。
{n}有{i}吗？ | {n}家里有{c}的{i}，{p}里也有。
""",
}
SCENES = {
    "en": """
On {d} {n} goes to the {p}. It is a {w} day.
{n} likes {c} {i}. {m} likes {x} {i} more.
The {i} on the table are {c}. {n} looks at them and smiles.
{n} and {m} walk from the {p} to the {q}. They talk about {i}.
It is {w} on {d}, so {m} stays in the {p}.
After that {n} is happy and goes home.
""",
    "zh": """
{d}{n}去{p}，天气很{w}。
{n}喜欢{c}的{i}，{m}更喜欢{x}的{i}。
桌子上的{i}是{c}的，{n}看着它们笑了。
{n}和{m}从{p}走到{q}，一路说着{i}。
{d}天气{w}，{m}就在{p}里。
后来{n}很高兴，回家了。
""",
}


def number_word(n: int, language: str) -> str:
    """The number 0…99 in words: ``number_word(42, "en") == "forty-two"``, ``number_word(42, "zh") == "四十二"``."""
    tens, ones = divmod(n, 10)
    if language == "zh":
        head = ("" if tens == 1 else DIGITS_ZH[tens]) + "十" if tens else ""
        return head + (DIGITS_ZH[ones] if ones or not tens else "")
    if n < len(BELOW_TWENTY):
        return BELOW_TWENTY[n]
    return TENS[tens - 2] + (f"-{BELOW_TWENTY[ones]}" if ones else "")


def _slots(rng: random.Random, language: str) -> dict[str, str]:
    n, m = rng.sample(NAMES[language], 2)
    p, q = rng.sample(PLACES[language], 2)
    c, x = rng.sample(COLOURS[language], 2)
    d, f = rng.sample(DAYS[language], 2)
    i, w = rng.choice(ITEMS[language]), rng.choice(WEATHER[language])
    return {"n": n, "m": m, "p": p, "q": q, "c": c, "x": x, "d": d, "f": f, "i": i, "w": w}


def _lines(table: str) -> list[str]:
    return table.strip().splitlines()


def _operation(rng: random.Random, op: str, first: int | None = None) -> tuple[int, int, int]:
    """Two operands and the result, inside the facts the text teaches: ``a+b``, its inverse, and the small products."""
    if op == "*":
        a, b = rng.randint(SMALLEST, LARGEST_FACTOR), rng.randint(SMALLEST, LARGEST_FACTOR)
        return a, b, a * b
    if op == "+":
        a, b = first or rng.randint(SMALLEST, LARGEST_ADDEND), rng.randint(SMALLEST, LARGEST_ADDEND)
        return a, b, a + b
    result = rng.randint(SMALLEST, LARGEST_ADDEND if first is None else first - SMALLEST)
    a = first or result + rng.randint(SMALLEST, LARGEST_ADDEND)
    return a, a - result, result


def _numbers(rng: random.Random, steps: tuple[str, ...]) -> tuple[dict[str, int], list[str]]:
    """Values of a, b (and c), and one equation a step; the second step starts from a first result of at most 20."""
    while True:
        a, b, x = _operation(rng, steps[0][1])
        if len(steps) == 1:
            return {"a": a, "b": b}, [f"{a} {steps[0][1]} {b} = {x}"]
        if 2 * SMALLEST <= x <= LARGEST_ADDEND:
            _, c, y = _operation(rng, steps[1][1], first=x)
            return {"a": a, "b": b, "c": c}, [f"{a} {steps[0][1]} {b} = {x}", f"{x} {steps[1][1]} {c} = {y}"]


def _tell(rng: random.Random, situation: Situation) -> tuple[dict[str, int], str, str, str, list[str]]:
    """Numbers, setup, worked sentence, question and equations of one situation with all slots filled."""
    numbers, equations = _numbers(rng, situation.steps)
    words = {**_slots(rng, situation.language), **{k: str(v) for k, v in numbers.items()}, "e": equations[-1]}
    stop = {"en": ". ", "zh": "。"}[situation.language]
    worked = "".join(e + stop for e in equations[:-1]) + situation.worked.format(**words)
    return numbers, situation.setup.format(**words), worked, situation.question.format(**words), equations


def _space(language: str) -> str:
    return " " if language == "en" else ""


def _scene(rng: random.Random, language: str, count: int) -> str:
    slots = _slots(rng, language)
    return _space(language).join(s.format(**slots) for s in rng.sample(_lines(SCENES[language]), count))


def _story(rng: random.Random, language: str) -> str:
    """A situation told and worked out, at times asked about, after a scene, or line by line."""
    situation = rng.choice([s for s in SITUATIONS if s.language == language])
    _, setup, worked, question, equations = _tell(rng, situation)
    parts = [setup, worked]
    if rng.random() < 0.3:
        parts.insert(1, question)
    if rng.random() < 0.2:
        parts.insert(0, _scene(rng, language, 1))
    if rng.random() < 0.2:
        result = equations[-1].rsplit(" ", 1)[1]
        parts.append({"en": f"That makes {result}.", "zh": f"就是{result}。"}[language])
    return ("\n" if rng.random() < 0.3 else _space(language)).join(parts)


def _sums(rng: random.Random, language: str) -> str:
    """A sheet of written-out sums under a heading of one to four hash signs."""
    title = {"en": f"Sums for {rng.choice(DAYS['en'])}", "zh": f"{rng.choice(DAYS['zh'])}的算术"}[language]
    rows = []
    for _ in range(rng.randint(6, 14)):
        op = rng.choice("++--*")
        a, b, x = _operation(rng, op)
        rows.append(f"{a} {op} {b} = {x}")
    return "#" * rng.randint(1, 4) + f" {title}\n" + "\n".join(rows)


def _counting(rng: random.Random, language: str) -> str:
    """Counting, numbers in words, and comparisons."""
    kind, n, m = rng.randrange(3), *rng.sample(range(1, 100), 2)
    if kind == 0:
        start = rng.randint(1, 90)
        return (", " if language == "en" else "、").join(str(k) for k in range(start, start + rng.randint(4, 9)))
    if kind == 1:
        verb, stop = {"en": (" is ", "."), "zh": ("是", "。")}[language]
        return _space(language).join(f"{k}{verb}{number_word(k, language)}{stop}" for k in (n, m))
    big, small = max(n, m), min(n, m)
    if language == "en":
        return f"{big} is more than {small}, and {small} is less than {big}."
    return f"{big}比{small}大，{small}比{big}小。"


def _plain(rng: random.Random, language: str) -> str:
    return _scene(rng, language, rng.randint(2, 4))


def _chat(rng: random.Random, language: str) -> str:
    """One or two turns of small talk in ChatML, at times with a system message; numbers get a scene for an answer."""
    turns = []
    for pair in rng.sample(_lines(SMALL_TALK[language]), rng.randint(1, 2)):
        slots = _slots(rng, language)
        turns.append([part.strip().format(**slots) for part in pair.split("|")])
    if rng.random() < 0.4:
        _, setup, _, question, _ = _tell(rng, rng.choice([s for s in SITUATIONS if s.language == language]))
        said = setup + _space(language) + question if rng.random() < 0.5 else setup
        turns[-1] = [said, _scene(rng, language, rng.randint(1, 3))]
    parts = []
    if rng.random() < 0.15:
        system = {"en": "You are a friendly neighbour.", "zh": "你是一位友好的邻居。"}[language]
        parts.append(f"{IM_START}system\n{system}{IM_END}\n")
    for user, assistant in turns:
        parts.append(f"{IM_START}user\n{user}{IM_END}\n{IM_START}assistant\n{assistant}{IM_END}\n")
    return "".join(parts)


KINDS: list[tuple[Callable[[random.Random, str], str], float]] = [
    (_story, 0.55),
    (_sums, 0.12),
    (_counting, 0.08),
    (_plain, 0.10),
    (_chat, 0.15),
]


def documents(seed: int) -> Iterator[str]:
    """An endless stream of short pre-training documents, the same for the same seed; chats have special tokens."""
    rng = random.Random(f"text {seed}")
    makers, weights = zip(*KINDS, strict=True)
    while True:
        (make,) = rng.choices(makers, weights)
        yield make(rng, rng.choice(("en", "zh")))


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question with its answer; ``template`` (an index into SITUATIONS) and ``numbers`` are what makes it unique."""

    template: int
    numbers: tuple[int, ...]
    question: str
    answer: str


def problems(seed: int, train: int, held_out: int) -> tuple[list[Problem], list[Problem]]:
    """Two lists of problems, no (template, numbers) twice in either or in both; half English, half Chinese."""
    rng = random.Random(f"problems {seed}")
    by_language = {k: [j for j, s in enumerate(SITUATIONS) if s.language == k] for k in ("en", "zh")}
    found: dict[tuple[int, tuple[int, ...]], Problem] = {}
    while len(found) < train + held_out:
        language = ("en", "zh")[len(found) % 2]
        template = rng.choice(by_language[language])
        numbers, setup, worked, question, equations = _tell(rng, SITUATIONS[template])
        key = template, tuple(numbers.values())
        answer = f"{worked}\n#### {equations[-1].rsplit(' ', 1)[1]}"
        found.setdefault(key, Problem(*key, setup + _space(language) + question, answer))
    rows = list(found.values())
    return rows[:train], rows[train:]
