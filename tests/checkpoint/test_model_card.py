"""The model card: front matter that hubs read, and every figure that is known."""

from qcompile.checkpoint.model_card import model_card
from qcompile.record import Record

STORED = {"quant_method": "compressed-tensors"}
RECORD = Record(
    "int8", "static", 0.5, "mse", 8, 4096, {"lm_head": "ignored"}, {"a.b": "pinned"}, "owner/model", "notes.txt",
    {"top-1 agreement": 0.98765},
)  # fmt: skip


def test_it_says_how_on_what_and_how_good() -> None:
    card = model_card(RECORD, STORED, 35, title="out")
    assert card.startswith("---\nlibrary_name: transformers\nbase_model: owner/model\ntags:\n- w8a8\n")
    for line in (
        "| numbers | INT8 |", "| activations | per tensor, static (clip: mse) |",
        "| smoothing | SmoothQuant, α = 0.5 |",
        "| calibration | 4096 tokens in 8 batches of notes.txt |", "| top-1 agreement | 0.9877 |",
        "In float: `lm_head` (ignored).", "Quantized without smoothing: `a.b` (pinned).", "35 linears",
    ):  # fmt: skip
        assert line in card
    assert "vLLM" in card


def test_a_local_folder_is_no_base_model() -> None:
    record = Record("int8", "token", None, "none", 1, 2, model="folder")
    card = model_card(record, {"quant_method": "smooth_quant"}, 1, title="out")
    assert "base_model" not in card
    assert "| smoothing | none |" in card
    assert "LMDeploy reads it" in card


def test_without_a_record_it_is_short() -> None:
    assert "|" not in model_card(None, STORED, 1, title="out")
