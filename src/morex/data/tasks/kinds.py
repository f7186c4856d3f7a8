"""Every kind of task."""

from morex.data.tasks.addition import Addition
from morex.data.tasks.arithmetic import Arithmetic
from morex.data.tasks.babi import Babi
from morex.data.tasks.chain import Chain
from morex.data.tasks.copying import Copy
from morex.data.tasks.counting import Counting
from morex.data.tasks.generated import GeneratedTask
from morex.data.tasks.gsm8k import Gsm8k
from morex.data.tasks.p_hop import PHop
from morex.data.tasks.parity import Parity
from morex.data.tasks.pattern import Pattern
from morex.data.tasks.text import TextTask

TASKS: dict[str, type[GeneratedTask] | type[TextTask]] = {
    "copy": Copy,
    "counting": Counting,
    "pattern": Pattern,
    "parity": Parity,
    "addition": Addition,
    "p_hop": PHop,
    "chain": Chain,
    "arithmetic": Arithmetic,
    "babi": Babi,
    "gsm8k": Gsm8k,
}
