"""Each message that advises a command, an option or a setting is followed in a test, or is listed here with the reason
why no test follows it. A new message with such advice turns this red.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
#: Where advice is followed.
TABLES = ["tests/config/test_advice.py", "tests/commands/test_advice.py", "tests/support/advice.py"]
#: Words of a message -> why its advice is not followed there.
_WEIGHTS = "needs published weights of feature networks"
_BY_HAND = "asks for another file or a mended one, and names no command"
NOT_THERE: dict[str, str] = {
    "takes images of any size; choose one with a size": _WEIGHTS,
    "needs a reference (--reference)": _WEIGHTS,
    "pass --weights clip=FOLDER": _WEIGHTS,
    "are not here and cannot be downloaded": _WEIGHTS,
    "so it is unclear which network it is for; pass NAME=PATH": _WEIGHTS,
    "pass each network once, as NAME=PATH": _WEIGHTS,
    "; pass a state dict": _WEIGHTS,
    "; pass the state dict alone": _WEIGHTS,
    "has neither images nor their features by": "followed where no row of features is stored, with the same words",
    "has statistics of images of": "the reference that it names is the protocol's default",
    "pass the images, or statistics made with that extractor": _WEIGHTS,
    "make it again with `fdistill reference`": "what the command makes is read in tests/evaluation",
    "its facts are not as `fdistill reference` writes them": "what the command makes is read in tests/evaluation",
    "which results of `fdistill evaluate` have": "what the command makes is compared in tests/commands/test_advice.py",
    "evaluate them again with the same metrics": "the metrics are named in the message",
    "takes none; leave them out, or pass a text-to-image model": "followed for generate, which has the same two ways",
    "are sets of images; pass one of these": _BY_HAND,
    "; choose another place": "any place that can be written",
    "expected one CONFIG and key=value settings": "every command of the tests has one",
    "one of decays, or one of sigma_rel as sigma_rel=0.1": "followed for numbers, which have the same two ways",
    "add their images, or remove what is no caption": _BY_HAND,
    "add the images, or remove their lines": _BY_HAND,
    "set HF_HUB_OFFLINE=1 to use one that is cached": "needs a hub",
    " lacks ": "what fdistill cache makes is read in tests/commands/test_advice.py",
    " cannot be read (": "what fdistill cache makes is read in tests/commands/test_advice.py",
    "use the folder with diffusers": "the folders are drawn with diffusers in tests/training/test_text_to_image.py",
    "look at the checkpoint with `fdistill inspect`": "inspect meets broken ones in tests/commands/test_inspect.py",
    "expected what `fdistill distill` wrote to OUTPUT/student": "its folders are read in tests/students",
    "pass network='module:function'": "followed in tests/adapters/test_own_network.py",
    "adapters need peft, which is not installed": "needs an environment without peft",
    "needs bitsandbytes, which is not installed": "needs an environment without bitsandbytes",
    "do not say the number of attention heads; pass it": "followed in tests/teachers/test_convert_dit.py",
    "whose captions are the prompts; expected data=": "both ways are runs in tests/training/test_text_to_image.py",
    "into stage ": "followed in tests/training/test_loop.py",
    "or change the run's setting": "followed for captions, in tests/commands/test_advice.py",
    ", but the teacher's images are ": "followed: the recipes stand in a variable part of the message",
    "remove file_name from every line instead": "both are read in evaluation/test_images_as_they_are.py",
    "; on CPUs launch them with ": "needs a launcher; tests/base/test_distributed.py starts processes by torch's",
    "that no other job has the port": "needs several machines, or another job",
    "parallel: hybrid shards within a machine": "needs several machines; fsdp trains in tests/base/test_distributed.py",
    "pass a file with one for each image (--prompts)": _WEIGHTS,
    "run again, with --resume if it was distill": "resumed in tests/training/test_loop.py",
    "check the path, or choose another one": "any place that can be written",
    "; choose another name": "any place that can be written",
    "wait until it has ended, or choose another place": "any place that can be written",
    "or pass --allow-skipped ": "followed in tests/evaluation/test_images_as_they_are.py",
    "; continue with --resume": "followed in tests/training/test_stopping.py",
    "Nothing was trained. Memory is counted.": "says which options stand for the rates that a plan assumes",
    "parallel: hybrid needs whole machines of ": "met in tests/planning/test_plan.py; any number that divides the GPUs",
    " reuse_samples would show the critic samples": "without it runs work in tests/training/test_bucket_runs.py",
    ", but without buckets nothing reads it": "with buckets it works in tests/training/test_bucket_runs.py",
    "Measured with `fdistill evaluate`, by its": "a sentence of a card, and no advice",
    " Without one nobody may use what is published": "--license is passed in tests/sharing/test_publication.py",
    ": has no config.yaml and metrics.jsonl; expected the folder": "folders of runs are read in tests/report",
    ": holds no student; expected a folder that": "its folders are pushed in tests/sharing/test_push.py",
    "; evaluate this student, and pass that file": "a file of this student is passed in tests/sharing",
    "mend the card's head, or the --license": "other licences are passed in tests/sharing/test_push.py",
    "; pass --public if that is meant, or choose": "followed in tests/sharing/test_push.py",
    " cannot be had at ": "pages at another port are opened in tests/commands/test_demo.py",
    " names code, which no student's folder may run": "followed in tests/commands/test_demo.py",
    "the student's folder names none; name it with --teacher": "followed in tests/commands/test_demo.py",
    ": it is not known under which names ComfyUI": "followed in tests/formats/test_published_lora_keys.py",
    "; leave ": "followed: the option stands in a variable part of the message",
}
_NAMES = re.compile(
    r"`fdistill |fdistill cache|--[a-z]|[;,] (or )?(set|pass|leave|choose|use|add|export|resume|train|evaluate) |"
    r"expected .*\b[a-z_]+=[a-z\d{]"
)


def messages() -> Iterator[tuple[str, list[str]]]:
    """(file and line, the literal parts) of each error's, warning's and returned text that advises such a thing."""
    for path in sorted([*ROOT.glob("fdistill/**/*.py"), *ROOT.glob("evaluation/**/*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            said = None
            if isinstance(node, ast.Call) and node.args and re.search(r"(Error|warn)$", ast.unparse(node.func)):
                said = node.args[0]
            elif isinstance(node, ast.Return):
                said = node.value
            parts = list(_literals(said)) if isinstance(said, (ast.Constant, ast.JoinedStr, ast.BinOp)) else []
            if _NAMES.search("{}".join(parts)):
                yield f"{path.relative_to(ROOT)}:{node.lineno}", parts


def _literals(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        for value in node.values:
            yield from _literals(value) if isinstance(value, ast.Constant) else [""]
    elif isinstance(node, ast.BinOp):
        yield from _literals(node.left)
        yield from _literals(node.right)


def followed() -> set[str]:
    """The texts in the tables."""
    return {
        re.sub(r"\\", "", text)
        for path in TABLES
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(text := node.value, str) and len(text) >= 10
    }


def _is_in(parts: list[str], texts: set[str]) -> bool:
    """Whether a text is in a part, or a part of some length in a text."""
    return any(text in part or (len(part.strip()) >= 10 and part.strip() in text) for part in parts for text in texts)


def test_advice_is_followed_or_listed() -> None:
    found, texts = list(messages()), followed()
    assert len(found) > 60
    assert [(where, parts) for where, parts in found if not _is_in(parts, texts | NOT_THERE.keys())] == []
    unused = [words for words in NOT_THERE if not any(words in part for _, parts in found for part in parts)]
    assert unused == []
