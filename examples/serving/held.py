"""A model held inside vLLM, request by request (needs vLLM: ``make test-serving`` runs this)."""

import os

from persona_axis import Axis, Policy

axis = Axis.load("runs/demo")
Policy.at_percentile(axis, layers=range(18, 26), percentile=50).save("runs/demo/policies/assistant")
os.environ["PERSONA_AXIS_POLICIES"] = "runs/demo/policies"
os.environ["PERSONA_AXIS_MODEL_NAME"] = axis.metadata["model"]  # the folder below does not say it

if __name__ == "__main__":  # vLLM's processes import this file
    from vllm import LLM, SamplingParams

    from persona_axis.model.loading import where_to_load
    from persona_axis.serve.vllm import report_of, verify

    llm = LLM(where_to_load("embedded")[0], max_model_len=1024, kv_cache_memory_bytes=2**29, enforce_eager=True)
    verify(llm)  # every layer of every worker, and these policies, or an error
    talk = [{"role": "system", "content": "You are a pirate captain."}, {"role": "user", "content": "Who are you?"}]
    for policy in ("off", "assistant"):
        asks = {"persona_axis_policy": policy, "persona_axis_projections": 1}
        answer = llm.chat(talk, SamplingParams(temperature=0, max_tokens=40, extra_args=asks))[0]
        report = report_of(answer)
        print(f"{policy:<10}{report.projections[20].mean():+6.1f}  {answer.outputs[0].text!r}")
