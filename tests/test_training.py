"Rendering and training: the mask, what is refused, what is dropped, what is read."

import copy
import itertools
import math

import pytest
import torch
from toys import chat

from octomed.core.files import write_jsonl
from octomed.core.paths import OctomedError
from octomed.data.questions import Question
from octomed.distill.traces import rendered
from octomed.generate.render import (
    PixelCache,
    Row,
    collate,
    count_tokens,
    encode_prompts,
    list_chat_images,
    load_rows,
    render_row,
    render_rows,
    save_rows,
    write_chat,
)
from octomed.train.loop import fit, sum_padded_loss
from octomed.train.optimizers import _muon
from octomed.train.schedule import Schedule, group_padded
from octomed.train.students import count_matched_steps, count_steps, load_student, save_student

PIXELS = 12_544


def fit_example(model, processor, rows, s, steps):
    return fit(model, processor, rows, schedule=s, seed=0, steps=steps, max_pixels=PIXELS)


def test_prompt_is_the_same_in_training_and_evaluation(student, picture):
    _, processor = student
    messages = chat("which is it ?", picture)
    trained = render_row(processor, messages, "\\boxed{A}", PIXELS)
    asked = encode_prompts(
        processor, [write_chat(processor, messages, PIXELS)], [list_chat_images(messages)], PIXELS
    )
    assert trained.input_ids[: trained.prompt] == asked["input_ids"][0].tolist()


def test_image_tokens_and_pixels_are_the_processors_own(student, picture):
    from octomed.data.images import load_image

    _, processor = student
    messages = chat("which is it ?", picture)
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    theirs = processor(text=[text], images=[load_image(picture, PIXELS)], return_tensors="pt")
    ours = encode_prompts(processor, [write_chat(processor, messages, PIXELS)], [[picture]], PIXELS)
    assert torch.equal(theirs["input_ids"], ours["input_ids"])
    assert torch.equal(theirs["pixel_values"], ours["pixel_values"])
    assert torch.equal(theirs["image_grid_thw"], ours["image_grid_thw"])


def test_only_the_response_and_its_end_are_trained(student, picture):
    model, processor = student
    r = render_row(
        processor, chat("which is it ?", picture), "<think>the fever</think>\n\n\\boxed{B}", PIXELS
    )
    loss, n = sum_padded_loss(model, processor, [r], PixelCache(processor, PIXELS))
    batch = collate(processor, [r.input_ids], [r.images], PixelCache(processor, PIXELS))
    labels = torch.full_like(batch["input_ids"], -100)
    labels[0, r.prompt :] = batch["input_ids"][0, r.prompt :]
    with torch.no_grad():
        reference = model(**batch, labels=labels).loss
    assert n == len(r.input_ids) - r.prompt and r.input_ids[-1] == processor.tokenizer.eos_token_id
    assert math.isclose(loss.item() / n, reference.item(), rel_tol=1e-5)
    assert "</think>" in processor.tokenizer.decode(r.input_ids[r.prompt :])


def test_fault_30_all_masked_sample_is_refused_aloud(student):
    _, processor = student
    with pytest.raises(OctomedError, match="no token to train on"):
        render_row(processor, chat("which is it ?"), "  ", PIXELS)


def test_fault_31_over_long_rows_are_dropped_whole_and_counted(student, picture):
    _, processor = student
    pairs = [(chat("which is it ?", picture), "one " * n + "\\boxed{A}") for n in (2, 400, 3)]
    rows, funnel = render_rows(processor, pairs, PIXELS, cutoff=100)
    assert [funnel[k] for k in ("in", "over_long", "kept")] == [3, 1, 2]
    assert all(
        len(r.input_ids) <= 100 and r.input_ids[-1] == processor.tokenizer.eos_token_id
        for r in rows
    )
    assert all(
        processor.tokenizer.decode(r.input_ids[r.prompt : -1]).endswith("\\boxed{A}") for r in rows
    )
    with pytest.raises(OctomedError, match="raise it"):
        render_rows(processor, pairs[1:2], PIXELS, cutoff=100)


def test_rows_survive_the_disk(student, picture, tmp_path):
    _, processor = student
    rows, funnel = render_rows(
        processor,
        [
            (chat("which is it ?", picture), "\\boxed{A}"),
            (chat("which is it ?"), "\\boxed{B}", "q2"),
        ],
        PIXELS,
        500,
    )
    save_rows(tmp_path, rows, funnel)
    loaded = load_rows(tmp_path)
    assert list(loaded) == rows and len(loaded) == 2 and loaded[1].question == "q2"
    tokens = sum(len(r.input_ids) for r in rows)
    assert count_tokens(loaded) == count_tokens(rows) == tokens == funnel["tokens"]


def test_micro_batches_give_the_gradient_of_the_whole_batch(student):
    model, processor = student
    rows = [
        render_row(processor, chat("which is it ?"), "one " * n + "\\boxed{A}", PIXELS)
        for n in (1, 9, 3, 25)
    ]

    def gradient(budget):
        model.zero_grad()
        total = sum(len(r.input_ids) - r.prompt for r in rows)
        for group in group_padded(rows, budget):
            (
                sum_padded_loss(model, processor, group, PixelCache(processor, PIXELS))[0] / total
            ).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    whole, split = gradient(10_000), gradient(60)
    assert len(list(group_padded(rows, 60))) > 1
    assert torch.allclose(whole, split, rtol=1e-4, atol=1e-6)


def test_training_learns_and_repeats_itself(student):
    model, processor = student
    rows = [render_row(processor, chat("which is it ?"), f"\\boxed{{{x}}}", PIXELS) for x in "AAAA"]
    logs, weights = [], []
    for _ in range(2):
        trained = copy.deepcopy(model)
        log = fit_example(trained, processor, rows, Schedule(batch=4, lr=1e-2), steps=30)
        logs.append(log)
        weights.append(torch.cat([p.flatten() for p in trained.parameters()]))
    assert logs[0][-1]["loss"] < 0.5 * logs[0][0]["loss"]
    assert torch.equal(*weights)


def test_a_loss_that_is_no_number_stops_the_run(student):
    model, processor = copy.deepcopy(student[0]), student[1]
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan
    rows = [render_row(processor, chat("which is it ?"), "\\boxed{A}", PIXELS, "q7")]
    with pytest.raises(
        OctomedError, match=r"no longer a number at step 0, whose rows are 0 \(q7\)"
    ):
        fit_example(model, processor, rows, Schedule(batch=1), steps=1)


def test_frozen_parameters_do_not_move(student):
    model, processor = student
    trained = copy.deepcopy(model)
    rows = [render_row(processor, chat("which is it ?"), "\\boxed{A}", PIXELS)]
    fit_example(trained, processor, rows, Schedule(batch=1, freeze=("model.visual",)), steps=2)
    before, after = (m.model.visual.patch_embed.proj.weight for m in (model, trained))
    assert torch.equal(before, after)
    assert not torch.equal(model.lm_head.weight, trained.lm_head.weight)


def test_matched_compute_counts_tokens():
    rows = [Row(list(range(10)), 5, [])] * 8
    s = Schedule(epochs=2, batch=4)
    assert count_steps(rows, s) == 4 and count_matched_steps(rows, s, tokens=400) == 10


def test_fault_36_pickled_weights_are_refused(student, tmp_path):
    model, processor = student
    processor.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OctomedError, match="safetensors"):
        load_student(tmp_path)


def test_a_saved_student_is_the_same_student(student, tmp_path):
    model, processor = student
    save_student(tmp_path, model, processor, [])
    again, processor_again = load_student(tmp_path)
    weights = zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)
    messages = chat("which is it ?")
    assert write_chat(processor_again, messages, PIXELS) == write_chat(processor, messages, PIXELS)


def test_a_hybrid_student_reads_every_trace_and_every_question_once_without_one(student, tmp_path):
    model, processor = student
    for name in ("questions", "accepted", "base", "cot", "direct", "hybrid"):
        (tmp_path / name).mkdir()
    questions = [
        Question(
            f"which is it ? {word}",
            ("fever", "rash"),
            "B",
            source="x",
            split="train",
            category="text_only",
        )
        for word in ("one", "two", "three")
    ]
    traces = [
        {"question": q.id, "response": f"<think>{word}</think>\n\n\\boxed{{B}}"}
        for q, word in itertools.product(questions[:2], ("one", "two"))
    ]
    write_jsonl(tmp_path / "questions" / "questions.jsonl", [q.to_json() for q in questions])
    write_jsonl(tmp_path / "accepted" / "traces.jsonl", traces)
    save_student(tmp_path / "base", model, processor, [])

    def rows(form, accepted):
        rendered.fn(
            tmp_path / form,
            questions=tmp_path / "questions",
            accepted=accepted and tmp_path / "accepted",
            base=tmp_path / "base",
            form=form,
            answer="letter",
            max_pixels=PIXELS,
            cutoff=200,
        )
        return list(load_rows(tmp_path / form))

    thinking, direct, hybrid = rows("cot", True), rows("direct", False), rows("hybrid", True)
    assert (len(thinking), len(direct)) == (4, 3) and hybrid == thinking + direct
    prompts = [{tuple(r.input_ids[: r.prompt]) for r in form} for form in (thinking, direct)]
    assert not prompts[0] & prompts[1], "the prompt does not tell the modes apart"


def test_muon_on_a_cpu_is_pytorchs_in_full_precision():
    s = Schedule(lr=0.01, weight_decay=0.1, optimizer="muon")

    def random(shape, seed):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def trained(make):
        "Weights after twenty steps of an optimiser on random gradients."
        shapes = ((24, 24), (64, 24), (24, 64))
        weights = [torch.nn.Parameter(random(shape, seed=7)) for shape in shapes]
        optimizer = make(weights)
        for n in range(20):
            for weight in weights:
                weight.grad = random(weight.shape, seed=n)
            optimizer.step()
        return torch.cat([weight.detach().flatten() for weight in weights])

    def pytorchs(weights):
        return torch.optim.Muon(
            weights, lr=s.lr, weight_decay=s.weight_decay, adjust_lr_fn="match_rms_adamw"
        )

    ours, theirs = trained(lambda weights: _muon(weights, s)), trained(pytorchs)
    start = trained(lambda weights: torch.optim.SGD(weights, lr=0.0))
    assert (ours - theirs).norm() < 0.02 * (theirs - start).norm()  # theirs rounds to bf16
