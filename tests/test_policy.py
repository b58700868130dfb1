"A policy: its objective against a plain reference, its rollouts, its loop, and what stops it."

import itertools
import json
import math
import random

import pytest
import torch
from test_wide import config
from toys import WORDS, chat

from octomed.core.files import read_jsonl, write_json
from octomed.core.paths import OctomedError, UsageError
from octomed.core.store import ExternalInput, run_stage
from octomed.data.questions import Question
from octomed.distill.rejection import judge_samples
from octomed.distill.rewards import REWARDS, find_reward, shuffle_rewards
from octomed.generate.engine_transformers import TransformersEngine
from octomed.generate.render import PixelCache, Row, list_image_ids
from octomed.generate.samples import Request, Sampling
from octomed.train.loop import CheckpointKeeper, prepare_padded
from octomed.train.objective import prepare_packed
from octomed.train.policy import (
    PolicyOptions,
    TokenFacts,
    compare_in_group,
    logprobs_class,
    sum_policy_loss,
    weigh_responses,
)
from octomed.train.reinforce import (
    PolicyPlan,
    PolicyRow,
    find_collapse,
    list_prompts,
    make_policy_rows,
    policy,
    policy_rate,
    take_policy_step,
)
from octomed.train.schedule import Schedule
from octomed.train.students import load_student, save_student

PIXELS = 12_544
SIZES = (3, 1, 5, 2)  # tokens of four responses


def draw_batch(seed):
    "Log-probabilities now, before and as drawn, and advantages, of four responses off policy."
    rng = random.Random(seed)
    apart = [[rng.gauss(-1.5, 0.7) for _ in range(n)] for n in SIZES]
    before = [[x + rng.gauss(0, 0.3) for x in row] for row in apart]
    drawn = [[x + rng.gauss(0, 0.4) for x in row] for row in before]
    start = [[x + rng.gauss(0, 0.5) for x in row] for row in apart]
    return apart, before, drawn, start, [rng.gauss(0, 1) for _ in SIZES]


def plain_objective(now, batch, options, longest):
    "The equation of the notebook, one token at a time, as a loss."
    _, before, drawn, start, advantages = batch
    total = sum(SIZES)
    loss = 0.0
    for i, size in enumerate(SIZES):
        weight = {
            "tokens": 1.0,
            "response": total / (len(SIZES) * size),
            "constant": total / (len(SIZES) * longest),
        }[options.normalise]
        whole = torch.stack([now[i][t] - before[i][t] for t in range(size)]).mean().exp()
        for t in range(size):
            ratio = whole if options.ratio == "sequence" else (now[i][t] - before[i][t]).exp()
            low, high = 1 - options.clip_low, 1 + options.clip_high
            held = min(max(ratio, torch.tensor(low)), torch.tensor(high))
            gain = min(ratio * advantages[i], held * advantages[i])
            truth = min(math.exp(before[i][t] - drawn[i][t]), options.truncate)
            change = start[i][t] - now[i][t]
            apart = ratio * (change.exp() - change - 1)
            loss = loss - weight * (truth * gain - options.kl * apart)
    return loss / total


def flat(rows):
    return torch.tensor(list(itertools.chain.from_iterable(rows)))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kl", [0.0, 0.1])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("normalise", ["tokens", "response", "constant"])
def test_loss_and_gradient_are_those_of_the_equation(normalise, ratio, kl, seed):
    options = PolicyOptions(normalise=normalise, ratio=ratio, kl=kl)
    batch = draw_batch(seed)
    theirs = [[torch.tensor(x, requires_grad=True) for x in row] for row in batch[0]]
    expected = plain_objective(theirs, batch, options, longest=8)
    expected.backward()
    now = flat(batch[0]).requires_grad_()
    sizes = torch.tensor(SIZES)
    weights = torch.tensor(weigh_responses(list(SIZES), normalise, longest=8))
    facts = TokenFacts(
        before=flat(batch[1]),
        drawn=flat(batch[2]),
        advantage=torch.tensor(batch[4]).repeat_interleave(sizes),
        weight=weights.repeat_interleave(sizes),
        response=torch.arange(len(SIZES)).repeat_interleave(sizes),
        start=flat(batch[3]),
    )
    loss, _ = sum_policy_loss(now, facts, options)
    loss = loss / sum(SIZES)
    loss.backward()
    assert math.isclose(loss.item(), expected.item(), rel_tol=1e-4, abs_tol=1e-6)
    gradients = [x.grad.item() for x in itertools.chain.from_iterable(theirs)]
    assert torch.allclose(now.grad, torch.tensor(gradients), atol=1e-6)


def test_options_matter_off_policy():
    "Every option changes the loss of some batch, so a test of each is a test of something."
    batch, sizes = draw_batch(0), torch.tensor(SIZES)

    def loss(**changed):
        options = PolicyOptions(**changed)
        facts = TokenFacts(
            before=flat(batch[1]),
            drawn=flat(batch[2]),
            advantage=torch.tensor(batch[4]).repeat_interleave(sizes),
            weight=torch.ones(sum(SIZES)),
            response=torch.arange(len(SIZES)).repeat_interleave(sizes),
            start=flat(batch[3]),
        )
        return sum_policy_loss(flat(batch[0]), facts, options)[0].item()

    changes = [
        {"ratio": "sequence"},
        {"clip_low": 0.01},
        {"clip_high": 0.01},
        {"truncate": 1.0},
        {"kl": 0.5},
    ]
    assert all(loss(**change) != loss() for change in changes)


def test_on_policy_the_ratio_is_one_and_clipping_does_nothing():
    now = torch.tensor([-1.0, -0.3, -2.0], requires_grad=True)
    before = now.detach()
    advantage = torch.tensor([0.5, 0.5, -1.0])
    for kind in ("token", "sequence"):
        facts = TokenFacts(before, before, advantage, torch.ones(3), torch.tensor([0, 0, 1]))
        tight = PolicyOptions(clip_low=0.0, clip_high=1e-9, ratio=kind)
        loss, clipped = sum_policy_loss(now, facts, tight)
        (gradient,) = torch.autograd.grad(loss, now)
        assert torch.allclose(gradient, -advantage) and clipped == 0


def test_advantages_are_those_of_the_papers():
    assert compare_in_group([1, 0, 0, 0]) == [0.75, -0.25, -0.25, -0.25]
    divided = compare_in_group([1, 0, 0, 0], "deviation")
    assert math.isclose(divided[0], 0.75 / (0.5 + 1e-4))
    assert compare_in_group([1, 1]) == [0, 0] and compare_in_group([0.3]) == [0]


def test_unknown_choices_are_refused():
    with pytest.raises(UsageError, match="no ratio word: choose from token, sequence"):
        PolicyOptions(ratio="word")
    with pytest.raises(UsageError, match="responses be 2 or more"):
        PolicyPlan(responses=1)
    with pytest.raises(UsageError, match="no reward is registered as fame"):
        find_reward("fame")


def test_a_question_comes_again_when_all_have_come():
    plan = PolicyPlan(prompts=3, redraw=2)
    asked = list(
        itertools.chain.from_iterable(list_prompts(12, plan, seed=5, step=s) for s in range(4))
    )
    assert sorted(asked[:12]) == sorted(asked[12:]) == list(range(12))
    assert list_prompts(12, plan, seed=5, step=3) == list_prompts(12, plan, seed=5, step=3)
    assert [list_prompts(12, plan, seed=seed, step=0) for seed in (5, 6)].count(asked[:6]) == 1


def test_shuffled_rewards_are_the_same_rewards():
    groups = [[1.0, 0.0, 0.0], [1.0, 1.0], [0.0] * 5]
    dealt = [shuffle_rewards(groups, seed) for seed in range(20)]
    every = itertools.chain.from_iterable
    assert all(sorted(every(d)) == sorted(every(groups)) for d in dealt)
    assert all(list(map(len, d)) == [3, 2, 5] for d in dealt) and len({str(d) for d in dealt}) > 15


def test_the_rate_rises_and_stays():
    rates = [policy_rate(step, 10, Schedule(lr=1.0, warmup=0.3)) for step in range(10)]
    assert rates == pytest.approx([1 / 3, 2 / 3] + [1.0] * 8)


def test_a_collapse_is_told_and_only_a_collapse():
    def run(**last):
        start = {"right": 0.4, "entropy": 1.0, "cut": 0.1}
        return [{"step": n, **start, **(last if n >= 5 else {})} for n in range(10)]

    assert find_collapse(run()) is None and find_collapse(run(right=0.25)) is None
    assert "right responses fell" in find_collapse(run(right=0.1))
    assert "entropy fell" in find_collapse(run(entropy=0.05))
    assert "cut off" in find_collapse(run(cut=0.6))
    assert find_collapse(run(right=0.0)[:9]) is None, "too short to tell"


@pytest.fixture
def folder(student, tmp_path):
    save_student(tmp_path / "base", *student, [])
    return tmp_path / "base"


def test_rollouts_have_the_trainers_logprobs_with_pictures_padded_or_packed(folder, picture):
    "Drawn side by side, read packed, padded and one by one: the same log-probabilities."
    engine = TransformersEngine(folder, "toy@1", PIXELS)
    asked = [
        Request("with", chat("which is it ?", picture), "p", tuple(range(3))),
        Request("without", chat("one two"), "p", tuple(range(3))),
    ]
    sampling = Sampling(temperature=1.3, top_p=1.0, max_tokens=7)
    rollouts = list(engine.roll(asked, sampling))
    rows = [Row(r.prompt + r.ids, len(r.prompt), r.images) for r in rollouts]
    drawn = flat([r.logprobs for r in rollouts])
    model, processor = load_student(folder)
    never = list_image_ids(processor)
    pixels = PixelCache(processor, PIXELS)
    read = logprobs_class()(model, temperature=1.3, never=never, chunk=5)
    padded, _ = read(*prepare_padded(processor, rows, pixels))
    single = torch.cat([read(*prepare_padded(processor, [row], pixels))[0] for row in rows])
    assert torch.allclose(padded, drawn, atol=1e-4) and torch.allclose(single, drawn, atol=1e-4)
    from octomed.train.attention import use_packed_attention

    use_packed_attention(model, "sdpa")
    packed, _ = read(*prepare_packed(model, processor, rows, pixels))
    assert torch.allclose(packed, drawn, atol=1e-4)
    assert len(drawn) == sum(r.sample.tokens for r in rollouts)
    assert json.loads(rollouts[0].sample.logprobs) == pytest.approx(rollouts[0].logprobs, abs=1e-4)


def test_no_rollout_holds_a_token_that_stands_for_an_image(folder):
    engine = TransformersEngine(folder, "toy@1", PIXELS)
    with torch.no_grad():  # an untrained head finds every token about equally likely
        never = list_image_ids(engine.processor)
    asked = [Request("q", chat("which is it ?"), "p", tuple(range(200)))]
    drawn = engine.roll(asked, Sampling(temperature=5.0, top_p=1.0, max_tokens=12))
    assert never and not {token for r in drawn for token in r.ids} & set(never)


@pytest.mark.parametrize("wrong", [{"top_p": 0.9}, {"temperature": 0}, {"answer_tokens": 4}])
def test_a_sampling_that_is_not_the_policys_is_refused(folder, wrong):
    engine = TransformersEngine(folder, "toy@1", PIXELS)
    sampling = Sampling(**{"temperature": 1.0, "top_p": 1.0, "max_tokens": 4} | wrong)
    with pytest.raises(OctomedError, match="a policy"):
        list(engine.roll([Request("q", chat("one"), "p")], sampling))


@pytest.fixture
def job(folder, tmp_path):
    "The keywords of a policy stage on a toy student and eight questions with a budget."
    (tmp_path / "asked").mkdir()
    questions = [
        Question(
            stem=f"which is it ? {word}",
            options=("fever", "rash"),
            answer="A",
            source="toy",
            split="train",
            category="text_only",
            tags={"budget": 3},
        )
        for word in WORDS.split()[-8:]
    ]
    lines = "".join(json.dumps(q.to_json()) + "\n" for q in questions)
    (tmp_path / "asked" / "questions.jsonl").write_text(lines)
    return {
        "base": ExternalInput(folder),
        "questions": ExternalInput(tmp_path / "asked"),
        "form": "cot",
        "plan": PolicyPlan(steps=4, prompts=2, responses=3, reward="length", max_tokens=6),
        "schedule": Schedule(lr=1e-2, warmup=0.0),
        "seed": 0,
        "max_pixels": PIXELS,
    }


def weights_of(folder):
    return load_student(folder)[0].state_dict()


def assert_equal_weights(a, b, atol=0.0):
    assert all(torch.allclose(a[name], b[name], rtol=0, atol=atol) for name in a)


class Killed(BaseException):
    "What a kill is to a test."


def test_a_killed_policy_goes_on_and_ends_alike(job, own_places, tmp_path, monkeypatch):
    monkeypatch.setenv("OCTOMED_TRAIN", "checkpoint_every=1")
    stage = policy(**job)
    whole = run_stage(stage)
    expected, records = weights_of(whole), read_jsonl(whole / "log.jsonl")
    whole.rename(tmp_path / "whole")
    write, begun = CheckpointKeeper.write, []

    def dying(self, done, log):
        write(self, done, log)
        raise Killed

    for _ in range(3):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(CheckpointKeeper, "write", dying)
            run_stage(stage)
        begun.append(1)
    again = run_stage(stage)
    assert_equal_weights(expected, weights_of(again))
    timed = ("seconds", "drawing_seconds")
    for a, b in zip(records, read_jsonl(again / "log.jsonl"), strict=True):
        assert {k: v for k, v in a.items() if k not in timed} == {
            k: v for k, v in b.items() if k not in timed
        }
    assert not (again / "checkpoints").exists()
    assert any(not torch.equal(expected[n], weights_of(job["base"].path)[n]) for n in expected)


def test_two_processes_are_one_policy(job, own_places, tmp_path, monkeypatch):
    job = {**job, "schedule": Schedule(lr=5e-3, warmup=0.0)}
    alone = run_stage(policy(**job)).rename(tmp_path / "alone")
    monkeypatch.setenv("OCTOMED_TRAIN", f"accelerate={config(tmp_path)}")
    wide = run_stage(policy(**job))
    assert_equal_weights(weights_of(alone), weights_of(wide), atol=1e-5)
    logs = [read_jsonl(f / "log.jsonl") for f in (alone, wide)]
    for a, b in zip(*logs, strict=True):
        assert a["asked"] == b["asked"] and math.isclose(a["reward"], b["reward"], rel_tol=1e-6)
        assert math.isclose(a["norm"], b["norm"], rel_tol=1e-3)


def test_every_rollout_is_kept_and_rejection_reads_it(job, own_places):
    folder = run_stage(policy(**job))
    asked = read_jsonl(folder / "requests.jsonl")
    records = read_jsonl(folder / "log.jsonl")
    assert len(asked) == sum(len(record["asked"]) for record in records)
    questions = [
        Question.from_json(row) for row in read_jsonl(job["questions"].path / "questions.jsonl")
    ]
    drawn = judge_samples(questions, folder)
    assert sum(map(len, drawn.values())) == 3 * len(asked)
    texts = [sample.logprobs for pairs in drawn.values() for sample, _ in pairs]
    assert all(len(json.loads(text)) for text in texts)
    assert json.loads((folder / "collapse.json").read_text()) == {"collapse": None}


def test_a_sampler_with_other_weights_stops_the_run(job, own_places, monkeypatch):
    def forget(engine, model, identity):
        state = {name: value + 0.3 for name, value in model.state_dict().items()}
        engine.net.load_state_dict(state)
        engine.model = identity

    monkeypatch.setattr(TransformersEngine, "take_weights", forget)
    with pytest.raises(OctomedError, match="sampler and trainer give tokens log-probabilities"):
        run_stage(policy(**job))


def test_cut_responses_and_groups_alike_are_left_out(job, own_places, monkeypatch):
    seen = []

    def watched(drawer, loop, step):
        from octomed.train import reinforce

        every, used = reinforce.draw_groups(drawer, loop, step)
        seen.append((every, used, make_policy_rows(used, drawer.plan)))
        return take_policy_step(drawer, loop, step)

    monkeypatch.setattr("octomed.train.reinforce.take_policy_step", watched)
    run_stage(policy(**job))
    for every, used, rows in seen:
        assert len(used) <= 2 <= len(every) <= 4
        whole = [r for g in used for r in g.rollouts if r.sample.finish != "length"]
        assert len(rows) == len(whole) and all(isinstance(row, PolicyRow) for row in rows)
    cut = [r for every, _, _ in seen for g in every for r in g.rollouts]
    assert any(r.sample.finish == "length" for r in cut)


def test_a_policy_learns_what_is_rewarded(job, own_places):
    "Asked for three tokens, it writes about three of the twelve that it may write."
    from dataclasses import replace

    plan = replace(job["plan"], steps=25, prompts=4, responses=8, max_tokens=12, mask_cut=False)
    folder = run_stage(policy(**{**job, "plan": plan}))
    lengths = [record["length"] for record in read_jsonl(folder / "log.jsonl")]
    assert sum(lengths[:3]) / 3 > 8 and sum(lengths[-3:]) / 3 < 5


def test_more_updates_read_the_policy_before_them(job, own_places):
    from dataclasses import replace

    plan = replace(job["plan"], updates=2, options=PolicyOptions(kl=0.1))
    folder = run_stage(policy(**{**job, "plan": plan}))
    records = read_jsonl(folder / "log.jsonl")
    assert len(records) == 4 and all(record["largest_disagreement"] < 1e-3 for record in records)


def test_what_a_policy_cannot_do_is_one_sentence(job, own_places, tmp_path, monkeypatch, capfd):
    from dataclasses import replace

    with pytest.raises(OctomedError, match="set lora to 0"):
        run_stage(policy(**{**job, "schedule": Schedule(lora=2)}))
    monkeypatch.setenv("OCTOMED_TRAIN", f"accelerate={config(tmp_path)}")
    with pytest.raises(OctomedError, match="read its messages above"):
        run_stage(policy(**{**job, "plan": replace(job["plan"], updates=2)}))
    assert "set updates to 1" in capfd.readouterr().err


def test_rewards_are_offered_by_name():
    assert set(REWARDS) >= {"verdict", "form", "validity", "length"}


def test_a_job_survives_its_file(job, tmp_path):
    from dataclasses import asdict

    from octomed.train.reinforce import read_job

    facts = {**job, "base": "b", "questions": "q"}
    write_json(
        tmp_path / "job.json",
        {**facts, "plan": asdict(job["plan"]), "schedule": asdict(job["schedule"])},
    )
    assert read_job(tmp_path) == facts
