"""Can students that start from the shipped base learn the clinic? On dev, arm by arm.

Each arm is read alone, on the dev split of its own pool: questions whose join it has read (seen),
and questions whose join is held out (unseen; there the joins are the units of the interval). Two
arms are never compared here: that is what the course is for.

    python tests/soak/competence.py [--base NAME] [--questions N] [--epochs E] [--only text]
        writes outputs/reference/soak/competence.json

It takes some 20 minutes of two slow cores.
"""

import argparse
import time
from dataclasses import replace

import numpy as np

from octomed.core.files import write_json
from octomed.core.identity import make_card
from octomed.core.paths import root
from octomed.core.recipe import Recipe, load_recipe
from octomed.evaluate.arms import Arm, schedule_of
from octomed.evaluate.chance import declare_chance, measure_chance
from octomed.evaluate.evaluate import compute_rates
from octomed.evaluate.results import run_arms
from octomed.evaluate.stats import estimate_share

POOLS = {"text": "clinic_ward", "reasoning": "clinic_rounds", "classification": "clinic_reading"}
FORMS = ("cot", "direct")
LEVELS = {"text": 0.75, "reasoning": 0.75, "classification": 0.85}  # of seen joins, or of all


def declare(recipe: Recipe, pool: str, form: str, settings) -> Arm:
    "An arm of one pool; a direct student needs no teacher."
    return Arm(
        sources=((f"{pool}:train", settings.questions),),
        form=form,
        k=1 if form == "cot" else 0,
        schedule=schedule_of(recipe.common, settings.epochs, freeze=tuple(settings.freeze)),
        likelihood=True,
    )


def share_of_joins(rows: list[dict], n: int = 10_000) -> dict:
    "Accuracy with a 95 % interval whose units are the joins with all their questions."
    by_join = {}
    for row in rows:
        by_join.setdefault(row["tags"]["join"], []).append(row["statuses"][0] == "correct")
    right = np.array([sum(each) for each in by_join.values()])
    asked = np.array([len(each) for each in by_join.values()])
    drawn = np.random.default_rng(0).integers(len(right), size=(n, len(right)))
    shares = right[drawn].sum(1) / asked[drawn].sum(1)
    low, high = np.quantile(shares, (0.025, 0.975))
    return {
        "accuracy": float(right.sum() / asked.sum()),
        "low": float(low),
        "high": float(high),
        "questions": int(asked.sum()),
        "joins": len(right),
    }


def share_of_questions(rows: list[dict]) -> dict:
    share = estimate_share([row["statuses"][0] == "correct" for row in rows])
    return {
        "accuracy": share.estimate,
        "low": share.low,
        "high": share.high,
        "questions": share.n,
    }


def by_steps(rows: list[dict]) -> dict[int, float]:
    "Accuracy by the steps that a question takes."
    steps = {}
    for row in rows:
        steps.setdefault(row["tags"]["steps"], []).append(row["statuses"][0] == "correct")
    return {count: round(float(np.mean(right)), 3) for count, right in sorted(steps.items())}


def read_arm(results, name: str, benchmark: str) -> dict:
    "One arm on its own benchmark."
    rows = results.rows[name][benchmark][0]
    rates = compute_rates(rows)
    chance = measure_chance(results, name, benchmark)
    facts = {
        "unparsed": rates["unparsed"] + rates["truncated"],
        "tokens": rates["mean_tokens"],
        "guess": chance.guess,
        "chance_student": chance.student,
        "all": share_of_questions(rows),
        "by_steps": by_steps(rows),
    }
    forced = results.take_reading("likelihood")
    facts["all_by_likelihood"] = share_of_questions(forced.rows[name][benchmark][0])
    for part in ("seen", "unseen"):
        kept = results.take_joins(part)
        if benchmark in kept.rows[name]:
            facts[part] = share_of_joins(kept.rows[name][benchmark][0])
            facts[part]["chance_student"] = measure_chance(kept, name, benchmark).student
    return facts


def measure(category: str, settings) -> dict:
    "The arms of one category, with their chance students."
    pool = POOLS[category]
    course = load_recipe("course")
    benchmark = f"{pool}:dev"
    common = replace(
        course.common,
        student=settings.base,
        benchmarks=(benchmark,),
        benchmark_limit=0,
        batch=settings.batch,
        lr=settings.lr,
        teacher_text=settings.teacher or course.common.teacher_text,
    )
    recipe = replace(course, common=common)
    arms = {form: declare(recipe, pool, form, settings) for form in FORMS}
    started = time.time()
    results = run_arms({**arms, **declare_chance(arms)}, recipe)
    read = {form: read_arm(results, form, benchmark) for form in FORMS}
    return {"arms": read, "minutes": round((time.time() - started) / 60, 1)}


def is_good(category: str, measured: dict) -> bool:
    "Whether one form reaches the level, is beyond chance where joins are new, and is read."
    part = "all" if category == "classification" else "seen"
    for facts in measured["arms"].values():
        reaches = facts[part]["accuracy"] >= LEVELS[category] and facts["unparsed"] <= 0.05
        unseen = facts.get("unseen")
        chance = max(facts["guess"], unseen["chance_student"] or 0) if unseen else 0
        if reaches and (not unseen or unseen["low"] > chance):
            return True
    return False


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="clinic/tiny")
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--freeze", nargs="*", default=[], help="such as model.visual")
    parser.add_argument("--teacher", default="", help="of text; by default the course's")
    parser.add_argument("--only", choices=POOLS)
    settings = parser.parse_args()
    measured = {}
    for category in [settings.only] if settings.only else POOLS:
        measured[category] = measure(category, settings)
        measured[category]["good"] = is_good(category, measured[category])
        for form, facts in measured[category]["arms"].items():
            print(category, form, facts, flush=True)
    if not settings.only:
        minutes = sum(part["minutes"] for part in measured.values())
        target = root() / "outputs" / "reference" / "soak" / "competence.json"
        card = make_card(minutes=minutes)
        write_json(target, {"settings": vars(settings), **measured, "card": card})


if __name__ == "__main__":
    main()
