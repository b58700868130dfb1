"""Models that only read text work wherever models that read images do.

Three families stand for what published ones bring; see `text_models.py`."""

import json

import pytest
import torch
from safetensors.torch import load_file
from text_models import FAMILIES, build_text_model, save_text_model
from toys import ask, chat

from octomed.core.paths import OctomedError
from octomed.generate import engine_transformers
from octomed.generate.engine_transformers import TransformersEngine
from octomed.generate.engines import ChatPrompt, choose_likeliest
from octomed.generate.models import (
    TextProcessor,
    find_padding,
    find_turn_end,
    open_processor,
    tokenize_chat,
)
from octomed.generate.render import load_processor, render_row, write_chat
from octomed.generate.samples import Sampling
from octomed.train.launch import Execution
from octomed.train.loop import fit, prepare_padded, sum_padded_loss
from octomed.train.objective import sum_packed_loss
from octomed.train.schedule import Schedule
from octomed.train.students import load_student, save_student

PIXELS = 12_544
SYSTEM = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
DRAWN = Sampling(temperature=1.0, max_tokens=8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "Family → the folder of a tiny model."
    return {family: save_text_model(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def engine(folders, family):
    return TransformersEngine(folders[family], f"{family}@1", max_pixels=PIXELS)


def text_rows(processor, n=5):
    "Rows of different lengths, some longer than Mistral's window."
    texts = ["It is the rash. " * (1 + i % 3) for i in range(n)]
    return [
        render_row(processor, chat(f"Which is it? {i}"), text, PIXELS)
        for i, text in enumerate(texts)
    ]


# --- the chat


def test_prompt_and_row_are_the_tokens_of_transformers_own_call(engine, folders, family):
    tokenizer = engine.processor.tokenizer
    own = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Which is it?"}], add_generation_prompt=True, tokenize=True
    )["input_ids"]
    (job,) = engine_transformers._list_jobs(engine, [ask("q", 1, "Which is it?")])
    assert tokenize_chat(engine.processor, job.text) == own and job.size == len(own)
    row = render_row(load_processor(folders[family]), chat("Which is it?"), "Rash.", PIXELS)
    assert row.input_ids[: row.prompt] == own
    begin = tokenizer.bos_token_id
    assert row.input_ids.count(begin) == (begin is not None)


def test_a_row_ends_on_the_end_of_the_turn_and_not_of_the_text(engine, family):
    row = render_row(engine.processor, chat("Which is it?"), "Rash.", PIXELS)
    tokenizer = engine.processor.tokenizer
    end = tokenizer.convert_tokens_to_ids(FAMILIES[family]["turn_end"])
    assert row.input_ids[-1] == end == find_turn_end(engine.processor)
    assert (end == tokenizer.eos_token_id) == (family == "qwen")
    assert row.input_ids.count(end) == 1 + (family == "llama") + (family == "qwen")


def test_a_systems_words_are_written_once_by_every_template(engine, family):
    text = write_chat(engine.processor, [SYSTEM, *chat("Which is it?")], PIXELS)
    assert text.count("Be brief.") == text.count("Which is it?") == 1
    assert engine.processor.has_system_turn == (family != "mistral")
    if family == "mistral":
        assert "Be brief.\n\nWhich is it?" in text


def test_a_template_that_leaves_the_system_out_without_a_word_is_noticed():
    _, tokenizer = build_text_model("mistral")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    processor = TextProcessor(tokenizer)
    assert processor.apply_chat_template([SYSTEM, *chat("Which?")]) == "Be brief.\n\nWhich?"


def test_todays_date_is_not_part_of_a_prompt():
    _, tokenizer = build_text_model("llama")
    tokenizer.chat_template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
        "{% endif %}{{ date_string }} {{ strftime_now('%Y') }} {{ messages[0].content }}"
    )
    text = TextProcessor(tokenizer).apply_chat_template(chat("Which?"))
    assert text == "26 Jul 2024 2024 Which?"


def test_a_thought_that_the_template_opened_is_not_opened_again(folders):
    processor = load_processor(folders["qwen"])
    for response, text in (
        ("<think>Red.</think>\n\nA", "<think>\nRed.</think>\n\nA"),
        ("A", "<think>\n\n</think>\n\nA"),
    ):
        row = render_row(processor, chat("Which?"), response, PIXELS)
        assert processor.tokenizer.decode(row.input_ids).endswith(f"{text}<|im_end|>")


@pytest.mark.parametrize(
    "template, says",
    [
        (None, "has no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "refuses a chat .roles must alternate"),
    ],
)
def test_a_template_that_cannot_write_the_chat_is_one_sentence(template, says):
    _, tokenizer = build_text_model("llama")
    tokenizer.chat_template = template
    with pytest.raises(OctomedError, match=says) as error:
        write_chat(TextProcessor(tokenizer), chat("Which?"), PIXELS)
    assert "\n" not in str(error.value)


def test_padding_is_a_token_that_the_model_knows_and_no_end():
    for family in FAMILIES:
        _, tokenizer = build_text_model(family)
        known = len(tokenizer)
        assert find_padding(TextProcessor(tokenizer)) not in (None, tokenizer.eos_token_id)
        tokenizer.add_special_tokens({"pad_token": "<|added later|>"})
        assert tokenizer.pad_token_id == known
        assert find_padding(TextProcessor(tokenizer, known)) < known


def test_the_tokenizer_is_saved_as_it_came(folders, tmp_path):
    processor = open_processor(folders["llama"])
    processor.save_pretrained(tmp_path)
    assert open_processor(tmp_path).tokenizer.pad_token is None
    assert open_processor(tmp_path).chat_template == processor.chat_template


# --- sampling


def test_a_sample_does_not_depend_on_its_neighbours(engine):
    long = ask("long", 1, "Which of these is it? " * 3)
    among = {(s.question, s.index): s.text for s in engine.generate([ask("q", 4), long], DRAWN)}
    alone = list(engine.generate([ask("q", 4)], DRAWN))
    assert len({s.text for s in alone}) > 1
    assert all(among["q", s.index] == s.text for s in alone)


def test_greedy_is_what_transformers_writes_by_itself(engine):
    prompt = write_chat(engine.processor, chat("Which is it?"), PIXELS)
    ids = torch.tensor([tokenize_chat(engine.processor, prompt)])
    own = engine.net.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=engine.ends,
        pad_token_id=find_padding(engine.processor),
    )[0, ids.shape[1] :]
    (sample,) = engine.generate([ask("q", 1, "Which is it?")], Sampling(0, max_tokens=12))
    expected = engine.processor.tokenizer.decode(own, skip_special_tokens=True)
    assert sample.text == expected and sample.tokens == len(own)


def test_every_end_that_a_model_declares_ends_a_response(engine, family, monkeypatch):
    tokenizer = engine.processor.tokenizer
    ends = {tokenizer.eos_token_id, find_turn_end(engine.processor)}
    assert ends <= set(engine.ends)
    for end in engine.ends:
        monkeypatch.setattr(
            engine_transformers,
            "choose_from_nucleus",
            lambda logits, u, end=end, **kw: torch.full(u.shape, end),
        )
        (sample,) = engine.generate([ask("q", 1)], DRAWN)
        assert (sample.text, sample.finish, sample.tokens) == ("", "stop", 1)


@pytest.fixture(scope="module")
def plain_engine(student, tmp_path_factory):
    "An engine on a model that reads images."
    folder = tmp_path_factory.mktemp("student")
    save_student(folder, *student, [])
    return TransformersEngine(folder, "tiny@1", max_pixels=PIXELS)


@pytest.mark.parametrize("kind", ["text", "images"])
def test_a_stop_string_ends_a_response_and_is_its_end(kind, folders, plain_engine):
    engine = plain_engine
    if kind == "text":
        engine = TransformersEngine(folders["llama"], "llama@1", max_pixels=PIXELS)
    request = [ask("q", 12)]
    free = {s.index: s.text for s in engine.generate(request, Sampling(1.0, max_tokens=16))}
    pairs = {text[i : i + 2] for text in free.values() for i in range(2, len(text) - 4)}
    stop = tuple(sorted(pair for pair in pairs if pair.isascii() and pair.isalnum())[:2])
    stopping = Sampling(1.0, max_tokens=16, stop=stop)
    stopped = list(engine.generate(request, stopping))
    assert sum(s.text != free[s.index] for s in stopped) >= 2
    for sample in stopped:
        whole = free[sample.index]
        ends = [whole.find(s) + len(s) for s in stop if s in whole]
        assert sample.text == whole[: min(ends, default=None)]
        assert sample.finish == "stop" or not ends
        assert sample.tokens <= 16


def test_a_stop_string_of_the_prompt_stops_nothing(folders):
    engine = TransformersEngine(folders["llama"], "llama@1", max_pixels=PIXELS)
    request = [ask("q", 4, "Which is it? xyz")]
    stopping = Sampling(1.0, max_tokens=8, stop=("xyz", "\n\n"))
    free = [s.text for s in engine.generate(request, DRAWN)]
    assert [s.text for s in engine.generate(request, stopping)] == free


# --- likelihood

OPTIONS = [" fever", " the rash, not the fever", " rash"]


def plain_likelihood(engine, ids, start):
    "One row alone: (sum of log-probabilities from `start` on, whether each is the likeliest)."
    with torch.no_grad():
        logits = engine.net(torch.tensor([ids[:-1]])).logits[0, start - 1 :].float()
    wanted = torch.tensor(ids[start:])
    chosen = logits.log_softmax(-1).gather(-1, wanted[:, None])
    return float(chosen.sum()), bool((logits.argmax(-1) == wanted).all())


def test_likelihoods_are_those_of_a_plain_loop(engine, family):
    tokenizer = engine.processor.tokenizer
    prompts = [
        "Which is it? Answer:",
        "The answer is the rash, not the fever. " * 3 + "It is",
        "Which? ",
    ]
    batched = engine.likelihoods(prompts, [OPTIONS] * 3)
    for prompt, row in zip(prompts, batched, strict=True):
        for option, likelihood in zip(OPTIONS, row, strict=True):
            ids = tokenizer(prompt + option)["input_ids"]  # as the harness does: begins as it does
            start = len(tokenizer(prompt.rstrip())["input_ids"])
            expected, greedy = plain_likelihood(engine, ids, start)
            assert likelihood.logprob == pytest.approx(expected, abs=1e-5)
            assert (likelihood.is_greedy, likelihood.tokens) == (greedy, len(ids) - start)
    assert (
        tokenizer("x")["input_ids"].count(tokenizer.bos_token_id) == FAMILIES[family]["adds_begin"]
    )


def test_a_greedy_continuation_is_recognised(engine):
    text = write_chat(engine.processor, chat("Which is it?"), PIXELS)
    ids = tokenize_chat(engine.processor, text.rstrip())
    with torch.no_grad():
        token = int(engine.net(torch.tensor([ids])).logits[0, -1].argmax())
    score = engine_transformers._read_likelihood(
        engine.net(torch.tensor([ids])).logits[0, -1:].detach(), [token]
    )
    other = engine_transformers._read_likelihood(
        engine.net(torch.tensor([ids])).logits[0, -1:].detach(), [(token + 1) % 300]
    )
    assert score.is_greedy and not other.is_greedy and score.logprob > other.logprob


def test_a_chat_and_a_begun_answer_are_prompts_too(engine, family):
    thought = "<think>It itches.</think>\n\nThe answer is"
    prompts = [ChatPrompt(chat("Which?")), ChatPrompt(chat("Which?"), thought)]
    plain, begun = engine.likelihoods(prompts, [OPTIONS, OPTIONS])
    text = write_chat(engine.processor, chat("Which?"), PIXELS)
    begins = text + (thought.removeprefix("<think>") if family == "qwen" else thought)
    for rendered, row in ((text, plain), (begins, begun)):
        ids = tokenize_chat(engine.processor, rendered + OPTIONS[1])
        start = len(tokenize_chat(engine.processor, rendered.rstrip()))
        assert row[1].logprob == pytest.approx(plain_likelihood(engine, ids, start)[0], abs=1e-5)


def test_options_of_one_token_share_a_forward_pass(engine, monkeypatch):
    rows = engine_transformers._list_rows(engine, ["Which? Answer:"] * 2, [["A", "B", "C"]] * 2)
    assert len(rows) == 1
    (asked,) = rows.values()
    assert [(a.prompt, a.place) for a in asked] == [(p, o) for p in range(2) for o in range(3)]


def test_small_groups_and_large_ones_agree(engine, monkeypatch):
    prompts = [f"Which is it? {'rash ' * n}Answer:" for n in range(9)]
    together = engine.likelihoods(prompts, [OPTIONS] * 9)
    monkeypatch.setattr(engine_transformers, "TOGETHER", 64)
    apart = engine.likelihoods(prompts, [OPTIONS] * 9)
    for first, second in zip(together, apart, strict=True):
        for a, b in zip(first, second, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-5)


def test_an_empty_prompt_begins_with_the_beginning_of_text(engine):
    ((score,),) = engine.likelihoods([""], [["The rash"]])
    tokenizer = engine.processor.tokenizer
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids = [first, *tokenizer("The rash", add_special_tokens=False)["input_ids"]]
    assert score.logprob == pytest.approx(plain_likelihood(engine, ids, 1)[0], abs=1e-5)


@pytest.mark.parametrize(
    "prompts, continuations, says",
    [
        (["a"], [[""]], "has no token"),
        ([""], [[""]], "has no token"),
        (["a"], [], "1 prompts have 0 lists"),
        (["rash " * 3000], [["a"]], "the model takes 2048"),
    ],
)
def test_what_cannot_be_scored_is_one_sentence(folders, prompts, continuations, says):
    engine = TransformersEngine(folders["llama"], "llama@1", max_pixels=PIXELS)
    with pytest.raises(OctomedError, match=says):
        engine.likelihoods(prompts, continuations)


def test_nothing_asked_is_nothing_scored(folders):
    engine = TransformersEngine(folders["llama"], "llama@1", max_pixels=PIXELS)
    assert engine.likelihoods([], []) == [] and engine.likelihoods(["a"], [[]]) == [[]]


def test_a_model_that_reads_images_scores_a_question_with_a_picture(plain_engine, picture):
    prompts = [ChatPrompt(chat("which is it ?", picture)), ChatPrompt(chat("which is it ?"))]
    options = ["fever", "the rash"]
    batched = plain_engine.likelihoods(prompts, [options] * 2)
    alone = [plain_engine.likelihoods([prompt], [options])[0] for prompt in prompts]
    for row, other in zip(batched, alone, strict=True):
        for a, b in zip(row, other, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
    assert batched[0][0].logprob != pytest.approx(batched[1][0].logprob, abs=1e-6)


def test_the_likeliest_option_by_sum_and_by_byte(engine):
    (scores,) = engine.likelihoods(["It is"], [OPTIONS])
    sums = [score.logprob for score in scores]
    by_byte = [s / len(o.encode()) for s, o in zip(sums, OPTIONS, strict=True)]
    assert choose_likeliest(sums) == sums.index(max(sums))
    assert choose_likeliest(sums, OPTIONS) == by_byte.index(max(by_byte))


# --- training


def own_loss(model, rows):
    "The summed loss as transformers computes it, each row alone."
    total = 0
    for row in rows:
        ids = torch.tensor([row.input_ids])
        logits = model(ids, use_cache=False).logits[0, row.prompt - 1 : -1].float()
        wanted = ids[0, row.prompt :]
        total = total + torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
    return total


@pytest.mark.parametrize("way", ["octomed_split", "sdpa", "padded"])
def test_loss_and_gradient_are_those_of_each_row_alone(family, way):
    from octomed.train.attention import check_isolation, use_packed_attention

    model, tokenizer = build_text_model(family)
    processor = TextProcessor(tokenizer)
    rows = text_rows(processor)
    assert max(len(row.input_ids) for row in rows) > 20, "longer than the window"
    own_loss(model, rows).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    loss = float(own_loss(model, rows).detach())
    model.zero_grad()
    if way == "padded":
        summed, count = sum_padded_loss(model, processor, rows, pixels=None)
    else:
        use_packed_attention(model, way)
        assert check_isolation(model, processor) < 1e-5
        summed, count = sum_packed_loss(model, processor, rows, pixels=None)
    summed.backward()
    assert count == sum(len(row.input_ids) - row.prompt for row in rows)
    assert float(summed.detach()) == pytest.approx(loss, rel=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-3, atol=1e-3, msg=name)


def test_a_packed_row_without_isolation_is_noticed(folders, monkeypatch):
    from octomed.train import attention

    model, processor = load_student(folders["llama"])
    attention.use_packed_attention(model, "octomed_split")
    monkeypatch.setattr(attention, "_is_packed", lambda *args, **kw: False)
    with pytest.raises(OctomedError, match="see each other"):
        attention.check_isolation(model, processor)


@pytest.mark.parametrize("changed", ["final_logit_softcapping", "logit_scale", "bias"])
def test_logits_that_are_more_than_states_times_head_are_trained_as_they_are(changed):
    from transformers import AutoConfig, AutoModelForCausalLM

    kinds = {"final_logit_softcapping": "gemma2", "logit_scale": "cohere", "bias": "phi"}
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    config = AutoConfig.for_model(
        kinds[changed],
        vocab_size=330,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
        **small,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    if changed == "bias":
        torch.nn.init.normal_(model.lm_head.bias)
    _, tokenizer = build_text_model("llama")
    rows = text_rows(TextProcessor(tokenizer), 3)
    loss, _ = sum_padded_loss(model, TextProcessor(tokenizer), rows, pixels=None)
    assert float(loss.detach()) == pytest.approx(float(own_loss(model, rows).detach()), rel=1e-4)


def test_a_padded_batch_has_nothing_that_a_text_model_does_not_know(folders):
    _, processor = load_student(folders["llama"])
    batch, at = prepare_padded(processor, text_rows(processor), pixels=None)
    assert set(batch) == {"input_ids", "attention_mask", "use_cache"}
    assert len(at) == sum(len(r.input_ids) - r.prompt for r in text_rows(processor))


@pytest.mark.parametrize("pack", [True, False])
def test_a_student_is_trained_saved_and_loaded(folders, family, pack, tmp_path):
    model, processor = load_student(folders[family])
    rows = text_rows(processor, 6)
    log = fit(
        model,
        processor,
        rows,
        schedule=Schedule(batch=3, lr=3e-3),
        seed=0,
        steps=6,
        max_pixels=PIXELS,
        how=Execution(pack=pack),
    )
    assert log[-1]["loss"] < log[0]["loss"]
    save_student(tmp_path, model, processor, log)
    again, other = load_student(tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    is_tied = FAMILIES[family]["more"]["tie_word_embeddings"]
    head, embeddings = again.get_output_embeddings(), again.get_input_embeddings()
    assert (head.weight is embeddings.weight) == is_tied
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) == (not is_tied)
    assert other.chat_template == processor.chat_template
    ends = json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"]
    assert ends == model.generation_config.eos_token_id and len(ends) == 2


def test_packed_and_padded_students_are_the_same(folders):
    ends = []
    for pack in (True, False):
        model, processor = load_student(folders["mistral"])
        fit(
            model,
            processor,
            text_rows(processor, 6),
            schedule=Schedule(batch=3, lr=1e-3),
            seed=0,
            steps=4,
            max_pixels=PIXELS,
            how=Execution(pack=pack),
        )
        ends.append([p.detach().clone() for p in model.parameters()])
    for packed, padded in zip(*ends, strict=True):
        torch.testing.assert_close(packed, padded, rtol=1e-2, atol=1e-4)


def test_values_for_sampling_without_sampling_do_not_stop_a_student_from_being_saved(
    folders, tmp_path
):
    source = tmp_path / "source"
    source.mkdir()
    for file in folders["llama"].iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    path = source / "generation_config.json"
    values = {**json.loads(path.read_text()), "do_sample": False, "temperature": 0.9}
    path.write_text(json.dumps(values))
    model, processor = load_student(source)
    save_student(tmp_path / "out", model, processor, [])
    assert load_student(tmp_path / "out")[0].generation_config.temperature == 0.9


def test_sizing_counts_each_parameter_once(folders, family):
    from octomed.train.sizing import Load, check_fit, load_shape, training_flops

    model, _ = load_student(folders[family])
    shape = load_shape(str(folders[family]))
    assert shape.total == sum(p.numel() for p in model.parameters())
    assert shape.matrices["head"] == model.get_output_embeddings().weight.numel()
    assert shape.parameters["tower"] == shape.vision_layers == 0
    assert (
        all(
            value > 0
            for value in training_flops(shape, Load(100, 50, answered=50)).values()
            if value
        )
        and len(check_fit(shape, Load(100, 50))) == 6
    )


# --- from the command line


@pytest.fixture
def questions(own_places):
    "A text-only pool and benchmark, and a benchmark whose questions have pictures."
    from octomed.data.questions import Question
    from octomed.data.sources import SOURCES, Source, register

    def make(name, split, n):
        return [
            Question(
                stem=f"{name} {i}: Which of these is it?",
                options=("fever", "rash"),
                answer="AB"[i % 2],
                source=name,
                split=split,
                category="text_only",
                origin=str(i),
            )
            for i in range(n)
        ]

    kinds = [
        ("toytext", "train", "train", "text_only", 8),
        ("toytext", "test", "benchmark", "text_only", 4),
        ("toypics", "test", "benchmark", "multimodal_reasoning", 4),
        ("toypics", "train", "train", "multimodal_reasoning", 4),
    ]
    for name, split, role, category, n in kinds:
        register(
            Source(
                name=name,
                split=split,
                category=category,
                role=role,
                make=lambda name=name, split=split, n=n, **_: make(name, split, n),
                revision="1",
                expected=n,
            )
        )
    yield
    for name, split, *_ in kinds:
        del SOURCES[f"{name}:{split}"]


def recipe_of(folder, student, **changed):
    "The path of a small recipe with this student."
    import yaml

    common = {
        "student": str(student),
        "teacher_text": "clinic/reasoner",
        "teacher_image": "clinic/instruct",
        "plugins": ["octomed.clinic.students", "octomed.clinic.teachers"],
        "train": ["toytext:train"],
        "benchmarks": ["toytext:test"],
        "batch": 4,
        "max_tokens": 8,
        "answer_tokens": 4,
        "eval_seeds": 2,
        "cutoff": 1024,
        **changed,
    }
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({"common": common, "sections": {}}))
    return str(path)


def test_a_text_model_is_evaluated_trained_and_evaluated_again(
    questions, folders, family, tmp_path, capsys
):
    from octomed.run.cli import main

    recipe = recipe_of(tmp_path, folders[family])
    asked = ["toytext:test", "--recipe", recipe, "--json"]
    assert main(["evaluate", str(folders[family]), *asked]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows and {row["n"] for row in rows} == {4}
    train = ["train", "toytext:train", "-k", "0", "--form", "direct", "--recipe", recipe]
    assert main([*train, "--epochs", "2", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["steps"] == 4
    assert main(["evaluate", row["folder"], *asked]) == 0


def test_the_exports_of_a_text_model(questions, folders, tmp_path, capsys):
    import yaml

    from octomed.run.cli import main

    recipe = recipe_of(tmp_path, folders["llama"])
    rest = ["toytext:train", "-k", "0", "--form", "direct", "--recipe", recipe, "--epochs", "1"]
    for kind in ("student", "hub", "llamafactory"):
        assert main(["export", kind, *rest, "--out", str(tmp_path / kind)]) == 0, kind
    student, _ = load_student(tmp_path / "student")
    assert student.lm_head.weight is student.model.embed_tokens.weight
    assert "pipeline_tag: text-generation" in (tmp_path / "student/README.md").read_text()
    settings = yaml.safe_load((tmp_path / "llamafactory/train.yaml").read_text())
    assert not {"template", "default_system", "image_max_pixels"} & set(settings)
    assert not {name for name in settings if name.startswith("freeze")}
    rows = [
        json.loads(line)
        for line in (tmp_path / "llamafactory/traces.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 8 and not any(
        "<|bos|>" in m["content"] for r in rows for m in r["messages"]
    )


PICTURED = [
    ("evaluate", ["evaluate", "FOLDER", "toypics:test"]),
    ("train", ["train", "toypics:train", "-k", "0", "--form", "direct"]),
    ("distill", ["distill", "toypics:train"]),
    ("export", ["export", "student", "toypics:train", "--out", "there"]),
]


@pytest.mark.parametrize("words", [words for _, words in PICTURED], ids=[n for n, _ in PICTURED])
def test_questions_with_pictures_are_refused_before_anything_is_done(
    words, questions, folders, tmp_path, capsys
):
    from octomed.core.paths import store_dir
    from octomed.run.cli import main

    folder = folders["llama"]
    recipe = recipe_of(tmp_path, folder)
    words = [str(folder) if word == "FOLDER" else word for word in words]
    assert main([*words, "--recipe", recipe]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    spec = next(word for word in words if word.startswith("toypics"))
    assert line == (
        f"octomed: {folder.name} reads no images, and {spec} has some: "
        "leave it out, or name a model that reads images"
    )
    assert not list(store_dir().glob("*/*"))


def test_a_teacher_for_images_that_reads_none_is_refused(questions, folders, tmp_path, capsys):
    from octomed.run.cli import main

    teacher = f"transformers:{folders['llama']}@1"
    recipe = recipe_of(tmp_path, "clinic/tiny", teacher_image=teacher)
    assert main(["distill", "toypics:train", "--recipe", recipe]) == 2
    assert "reads no images, and toypics:train has some" in capsys.readouterr().err
    assert main(["distill", "toytext:train", "--recipe", recipe, "--samples", "1"]) in (0, 1)
    assert "reads no images" not in capsys.readouterr().err


@pytest.mark.parametrize("key", ["train", "benchmarks"])
def test_a_rehearsal_refuses_what_the_real_student_cannot_read(
    key, questions, folders, tmp_path, capsys
):
    from octomed.run.rehearsal import rehearse

    split = "train" if key == "train" else "test"
    recipe = recipe_of(tmp_path, folders["llama"], **{key: [f"toypics:{split}"]})
    with pytest.raises(OctomedError, match="reads no images"):
        rehearse(recipe)


def section(folder):
    "A folder of notebooks with one section, which has one arm."
    cells = [
        ("code", 'recipe = "smoke"\nout = None', ["parameters"]),
        (
            "code",
            "#| export\n"
            "def arms(recipe):\n"
            "    from octomed.evaluate.arms import Arm\n"
            "    sources = tuple((spec, 0) for spec in recipe.common.train)\n"
            "    return {'one': Arm(sources, form='direct', k=0)}\n",
            [],
        ),
    ]
    notebook = {
        "cells": [
            {
                "cell_type": kind,
                "id": f"cell{i}",
                "metadata": {"tags": tags},
                "source": source,
                "outputs": [],
                "execution_count": None,
            }
            for i, (kind, source, tags) in enumerate(cells)
        ],
        "metadata": {
            "kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    folder.mkdir()
    (folder / "99_mine.ipynb").write_text(json.dumps(notebook))
    return folder


@pytest.mark.parametrize("benchmark, refused", [("toytext:test", False), ("toypics:test", True)])
def test_a_plan_sizes_a_text_model_and_refuses_pictures(
    benchmark, refused, questions, folders, tmp_path
):
    from octomed.core.recipe import load_recipe
    from octomed.evaluate.arms import Arm, schedule_of
    from octomed.run.plan_hours import memory_rows
    from octomed.run.plan_sections import plan_section

    recipe = load_recipe(recipe_of(tmp_path, folders["qwen"], benchmarks=[benchmark]))
    arm = Arm((("toytext:train", 0),), form="direct", k=0, schedule=schedule_of(recipe.common, 1.0))
    if refused:
        with pytest.raises(OctomedError, match="reads no images, and toypics:test has some"):
            plan_section(recipe, "mine", {"one": arm})
        return
    planned = plan_section(recipe, "mine", {"one": arm})
    assert planned["training_hours"] is not None and planned["evaluations"] == 1
    rows = memory_rows(recipe.common.student)
    assert {row["trained"] for row in rows} == {"all of it"} and len(rows) == 6
