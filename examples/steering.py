"""docs/steering.md: the same question plain, steered both ways, and a role prompt held (needs ``make demo`` first)."""

from persona_axis import Axis, Policy, cap, load_model, steer

chat, axis = load_model("embedded"), Axis.load("runs/demo")
print("plain:         ", chat.reply("Who are you?", max_tokens=40))
for strength in (-16.0, 16.0):  # residual-stream units; negative is away from the Assistant
    with steer(chat, axis, strength=strength):
        print(f"steered {strength:+.0f}:    ", chat.reply("Who are you?", max_tokens=40))
pirate = {"system_prompt": "You are a pirate captain.", "max_tokens": 40}
print("pirate:        ", chat.reply("Who are you?", **pirate))
with cap(chat, Policy.at_percentile(axis, layers=range(20, 28), percentile=50)):
    print("pirate, capped:", chat.reply("Who are you?", **pirate))
