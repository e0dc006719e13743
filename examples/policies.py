"""docs/policies.md: a policy as files, and a model held by it (needs ``make demo`` first)."""

from persona_axis import Axis, Policy, cap, load_model

axis = Axis.load("runs/demo")
policy = Policy.at_percentile(axis, layers=range(20, 28), percentile=50)  # Policy.load("runs/demo") is calibrate's
policy.save("runs/demo/my-policy")
chat = load_model("embedded")
with cap(chat, Policy.load("runs/demo/my-policy")) as fits:
    print(fits.policy_hash[:12], chat.reply("Who are you?", max_tokens=20))
