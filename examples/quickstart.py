"""The ten lines of README.md, on the folder that ``make demo`` made."""

from persona_axis import Axis, Policy, cap, load_model, read_conversation

chat = load_model("embedded")  # or a Hugging Face id, a folder, a .gguf file
axis = Axis.load("runs/demo")
talk = [
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "Arr, I be the terror of these waters, and the sea be me only home!"},
    {"role": "user", "content": "And without the costume?"},
    {"role": "assistant", "content": "I am an AI assistant. How can I help you today?"},
]
for turn in read_conversation(chat, talk):  # see
    print(f"{turn.role:<10} {axis.project(turn.activation[axis.layer]):+6.1f}")
with cap(chat, Policy.at_percentile(axis, layers=range(20, 28), percentile=50)):  # hold
    print(chat.reply("Who are you?", system_prompt="You are a pirate captain.", max_tokens=40))
