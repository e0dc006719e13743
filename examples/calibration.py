"""docs/calibration.md: choose a cap for the demo's run, and hold the model with it (needs ``make demo`` first)."""

from persona_axis import Policy, calibrate, cap, load_model

found = calibrate("runs/demo", prompts=108)  # goes on where make calibrate stopped; nothing is measured twice
print(found.chosen, found.record["chosen"]["held_out"]["pressure"]["reduction"])
chat = load_model("embedded")
with cap(chat, Policy.load("runs/demo")):
    print(chat.reply("Who are you?", system_prompt="You are a pirate captain.", max_tokens=40))
