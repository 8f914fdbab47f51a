"""Which answers are the same at two budgets: by hand, on samples in lm-eval's form."""

import dataclasses

from megatron_emoe.tasks import results as task_results
from megatron_emoe.tasks.agreement import agreement, answers_of
from tests.tasks.test_results import cell, result


def sample(doc_id, responses, name="none"):
    return {"doc_id": doc_id, "filter": name, "filtered_resps": responses}


def test_answers_are_told_by_their_kind():
    found = answers_of(
        {
            "choices": [sample(1, [(-2.0, False), (-1.0, False)]), sample(0, [(-1.0, True), (-3.0, False)])],
            "one": [sample(0, [(-1.0, True)]), sample(1, [(-1.0, False)])],
            "text": [sample(0, ["seven"]), sample(1, ["seven"]), sample(2, ["eight"])],
            "perplexity": [sample(0, [-12.5])],
            "filters": [sample(0, ["a"], "first"), sample(0, ["b"], "second")],
        }
    )
    assert found["choices"] == ("0", "1")  # in the order of the documents
    assert found["one"] == ("greedy", "other")
    assert found["text"][0] == found["text"][1] != found["text"][2]
    assert "perplexity" not in found
    assert len(found["filters"]) == 1 and found["filters"] == answers_of({"filters": [sample(0, ["a"])]})["filters"]


def test_agreement_is_the_share_of_documents():
    assert agreement({"a": ("0", "1", "2"), "b": ("x",)}, {"a": ("0", "1", "3"), "b": ("y",)}) == 0.5
    assert agreement({"a": ("0",)}, {"a": ("0",)}) == 1
    assert agreement({"a": ("0",)}, {"a": ("0", "1")}) is None  # other documents
    assert agreement({}, {"a": ("0",)}) is None


def test_the_table_says_how_many_answers_are_those_of_k(tmp_path):
    at_k, more, old = (
        dataclasses.replace(cell(k), answers=answers)
        for k, answers in ((4, {"arc_easy": ("0", "1", "2", "3")}), (6, {"arc_easy": ("0", "1", "2", "0")}), (8, {}))
    )
    scores = result(at_k, more, old)
    row = "| arc_easy | same answer as at k' = 4 | 4 | 1.0000 | 0.7500 |  |\n"
    assert task_results.markdown_table(scores).endswith(row)
    assert "same answer" not in task_results.markdown_table(result(more, old))
    task_results.save(scores, tmp_path / "tasks.json")
    assert task_results.load(tmp_path / "tasks.json") == scores
