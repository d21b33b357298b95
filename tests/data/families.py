"""What is learned under the chat templates of the field, written down by hand from each model's documented format.

Own templates are in `templates/`, as small as shows the habit of the family; the others come with TRL.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.tiny import tiny_tokenizer

EOS = "<|im_end|>"  # of the tiny tokenizer: what a template that writes eos_token writes
HERE = Path(__file__).parent / "templates"
INLINE = "<think>\n{r}\n</think>\n\n{a}"
SPECIAL = [
    "<s>", "</s>", "<end_of_turn>", "<start_of_turn>", "<turn|>", "<|turn>", "<|channel>", "<channel|>",
    "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", "<|tool>", "<tool|>", '<|"|>',
    "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|USER_TOKEN|>", "<|SYSTEM_TOKEN|>",
    "<|START_RESPONSE|>", "<|END_RESPONSE|>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>",
    "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>", "<|user|>", "<|assistant|>", "<|system|>", "<|observation|>", "[gMASK]", "<sop>",
    "<|start|>", "<|end|>", "<|return|>", "<|call|>", "<|channel|>", "<|message|>", "<|constrain|>",
    "<end_of_utterance>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<|eom_id|>", "<|python_tag|>", "<|eom|>", "<|eot|>", "<|header_start|>", "<|header_end|>", "<|end_of_turn|>",
    "<|im_sep|>", "<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "[|endofturn|]", "[|user|]",
    "[|assistant|]", "[|system|]", "<seed:bos>", "<seed:eos>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>",
    "<|im_middle|>", "<|begin_of_sentence|>", "<|end_of_sentence|>", "<|extra_4|>", "<|extra_0|>", "<|startoftext|>",
    "<|eos|>", "<|model|>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "<|tool_call_start|>",
    "<|tool_call_end|>", "<|tool_list_start|>", "<|tool_list_end|>", "<|tool_response_start|>",
    "<|tool_response_end|>",
]  # fmt: skip


@dataclass(frozen=True)
class Family:
    """What is learned of an answer {a} with reasoning {r}.

    prompt: what stands right before. mid, last: of a turn in the middle, and of the last one. first: of an answer with
    which the conversation begins; None: refused. reason, reason_mid: of a turn with reasoning; None: refused.
    users: whether two user turns may follow one another. call: of a turn that calls a tool; None: the template shows no
    tools. ends: whether the last turn's end is learned. thought: what the generation prompt opens.
    """

    name: str
    prompt: str
    mid: str
    last: str
    first: str | None
    reason: str | None
    reason_mid: str
    prompt_mid: str
    users: bool = True
    call: str | None = None
    ends: bool = True
    thought: str = ""
    system_in_user: bool = False
    trl: bool = False

    @property
    def template(self) -> str:
        if not self.trl:
            return (HERE / f"{self.name}.jinja").read_text(encoding="utf-8")
        import trl

        return (Path(trl.__file__).parent / "chat_templates" / f"{self.name}.jinja").read_text(encoding="utf-8")

    def tokenizer(self) -> Any:
        tokenizer = tiny_tokenizer(self.template)
        tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": SPECIAL})
        return tokenizer


def of(name: str, prompt: str, end: str = EOS, lead: str = "", **more: Any) -> Family:
    """A family whose turns are all alike, but for what `more` says."""
    plain = f"{lead}{{a}}{end}"
    reasoned = f"{lead}{INLINE}{end}"
    alike: dict[str, Any] = {
        "mid": plain, "last": plain, "first": plain, "reason": reasoned, "reason_mid": more.get("reason") or reasoned,
        "prompt_mid": prompt,
    }  # fmt: skip
    return Family(name, prompt, **(alike | more))


ALTERNATES: dict[str, Any] = {"users": False, "first": None}
CHATML = "<|im_start|>assistant\n"
LLAMA = "<|start_header_id|>assistant<|end_header_id|>\n\n"
HERMES = '<tool_call>\n{"name": "get_t", "arguments": {"city": "Oslo", "n": 3}}\n</tool_call><|im_end|>'
XML = (
    "<tool_call>\n<function=get_t>\n<parameter=city>\nOslo\n</parameter>\n<parameter=n>\n3\n</parameter>\n</function>\n"
    "</tool_call>"
)
NO_THOUGHT = "<think>\n\n</think>\n\n{a}<|im_end|>"

OWN = (
    of("mistral_v1", " [/INST]", **ALTERNATES, system_in_user=True),
    of("mistral_v3", "[/INST]", lead=" ", **ALTERNATES, system_in_user=True),
    of("mistral_v7", "[/INST]", lead=" ", first=f"{{a}}{EOS}"),
    of("magistral", "[/INST]", reason=f"[THINK]{{r}}[/THINK]{{a}}{EOS}"),
    of("llama2", " [/INST]", f" {EOS}", " ", **ALTERNATES),
    of("llama4", "<|header_start|>assistant<|header_end|>\n\n", "<|eot|>"),
    of("zephyr", "<|assistant|>\n"),
    of("vicuna", "ASSISTANT:", lead=" "),
    of("alpaca", "### Response:\n"),
    of("openchat", "GPT4 Correct Assistant:", "<|end_of_turn|>", " "),
    of("phi4", "<|im_start|>assistant<|im_sep|>"),
    of("olmo2", "<|assistant|>\n", "<|endoftext|>"),
    of("granite", "<|start_of_role|>assistant<|end_of_role|>", "<|end_of_text|>"),
    of("exaone", "[|assistant|]", "[|endofturn|]"),
    of(
        "exaone4", "[|assistant|]\n", "[|endofturn|]", reason="<think>\n{r}\n</think>\n\n{a}[|endofturn|]",
        reason_mid="{a}[|endofturn|]",
    ),
    of("command_r", "<|CHATBOT_TOKEN|>", "<|END_RESPONSE|>", "<|START_RESPONSE|>"),
    of("deepseek_v2", "Assistant:", lead=" "),
    of("smollm3", CHATML),
    of("seed_oss", "<seed:bos>assistant\n", "<seed:eos>", reason="<seed:think>{r}</seed:think>{a}<seed:eos>"),
    of("kimi_k2", "<|im_assistant|>assistant<|im_middle|>"),
    of("ernie", "Assistant: ", "<|end_of_sentence|>"),
    of("hunyuan", "<|extra_0|>", "<|eos|>"),
    of("glm4", "<|assistant|>\n", "<|user|>", last="{a}", reason=INLINE, reason_mid=INLINE + "<|user|>", ends=False),
    of("falcon", "Falcon:", "", " ", ends=False),
    of("metharme", "<|model|>", "<|user|>", last=f"{{a}}{EOS}", reason=INLINE + EOS, reason_mid=INLINE + "<|user|>"),
    of(
        "ends_last_only", "assistant: ", "<|endoftext|>", last=f"{{a}}{EOS}", reason=INLINE + EOS,
        reason_mid=INLINE + "<|endoftext|>",
    ),
    of("thought_dropped", "A: ", reason=None, reason_mid="\n\n{a}" + EOS, thought="<think>"),
    of("generation_with_end", "A: "),
    of("generation_without_end", "A: ", "", ends=False),
    of("generation_alternates", "A: ", **ALTERNATES, system_in_user=True),
    of(
        "hermes_tools", CHATML,
        call='<tool_call>{"name": "get_t", "arguments": {"city": "Oslo", "n": 3}}</tool_call><|im_end|>',
    ),
    of("tools_hidden", "A: "),
)  # fmt: skip

OF_TRL = (
    of("cohere", "<|CHATBOT_TOKEN|>", "<|END_OF_TURN_TOKEN|>", **ALTERNATES, trl=True),
    of("cohere2", "<|CHATBOT_TOKEN|><|START_RESPONSE|>", "<|END_RESPONSE|>", **ALTERNATES, trl=True),
    *(
        of(
            name, "<｜Assistant｜>", "<｜end▁of▁sentence｜>", reason=None, thought="<think>", trl=True,
            reason_mid="\n\n{a}<｜end▁of▁sentence｜>",
        )
        for name in ("deepseek_r1_distill", "deepseekv3")
    ),
    of("gemma", "<start_of_turn>model\n", "<end_of_turn>", **ALTERNATES, system_in_user=True, trl=True),
    of("gemma3", "<start_of_turn>model\n", "<end_of_turn>", **ALTERNATES, trl=True),
    of(
        "gemma4", "<|turn>model\n", "<turn|>", trl=True,
        call='<|tool_call>call:get_t{city:<|"|>Oslo<|"|>,n:3}<tool_call|><|tool_response>',
    ),
    of(
        "glm4moe", "<|assistant|>", "<|user|>", "\n<think></think>\n", last="\n<think></think>\n{a}", ends=False,
        reason="\n<think>{r}</think>\n{a}", reason_mid="\n<think></think>\n{a}<|user|>", trl=True,
        call="\n<think></think>\n<tool_call>get_t\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n"
        "<arg_key>n</arg_key>\n<arg_value>3</arg_value>\n</tool_call><|observation|>",
    ),
    of(
        "gptoss", "<|start|>assistant", "<|end|>", "<|channel|>final<|message|>", trl=True,
        last="<|channel|>final<|message|>{a}<|return|>",
        reason="<|channel|>analysis<|message|>{r}<|end|><|start|>assistant<|channel|>final<|message|>{a}<|return|>",
        reason_mid="<|channel|>final<|message|>{a}<|end|>",
        call=' to=functions.get_t<|channel|>commentary json<|message|>{"city": "Oslo", "n": 3}<|call|>',
    ),
    of("idefics3", "Assistant:", "<end_of_utterance>", " ", trl=True),
    of("smolvlm", "Assistant:", "<end_of_utterance>", " ", trl=True),
    of("lfm2", CHATML, trl=True),
    of("llama3", LLAMA, "<|eot_id|>", trl=True),
    of(
        "llama3_1", LLAMA, "<|eot_id|>", trl=True,
        call='{"name": "get_t", "parameters": {"city": "Oslo", "n": 3}}<|eot_id|>',
    ),
    of(
        "llama3_2", LLAMA, "<|eot_id|>", trl=True,
        call='{"name": "get_t", "parameters": {"city": "Oslo", "n": 3}}<|eot_id|>',
    ),
    of("llava_next", " [/INST]", "</s>", " ", first="{a}</s>", trl=True),
    of(
        "nemotron_3_nano", CHATML + "<think>", lead="</think>", thought="<think>", trl=True,
        reason="{r}\n</think>\n{a}<|im_end|>", reason_mid="</think>\n{a}<|im_end|>",
        call="</think>\n" + XML + "\n<|im_end|>",
    ),
    of("phi3", "<|assistant|>\n", "<|end|>", trl=True),
    of("phi3_5", "<|assistant|>\n", "<|end|>", trl=True),
    of("qwen2_5", CHATML, call=HERMES, trl=True),
    of("qwen2_5_vl", CHATML, trl=True),
    of(
        "qwen3", CHATML, last=NO_THOUGHT, reason=INLINE + EOS, reason_mid=f"{{a}}{EOS}", call=HERMES, trl=True,
    ),
    of("qwen3_instruct_2507", CHATML, call=HERMES, trl=True),
    of(
        "qwen3_5_think", CHATML + "<think>\n", prompt_mid=CHATML, last="\n</think>\n\n{a}<|im_end|>", trl=True,
        reason="{r}\n</think>\n\n{a}<|im_end|>", reason_mid="{a}<|im_end|>", thought="<think>",
        call="\n</think>\n\n" + XML + "<|im_end|>",
    ),
    of(
        "qwen3_8", CHATML + "<think>\n", lead="\n</think>\n\n", thought="<think>", trl=True,
        reason="{r}\n</think>\n\n{a}<|im_end|>", call="\n</think>\n\n" + XML + "<|im_end|>",
    ),
)  # fmt: skip

FAMILIES = OWN + OF_TRL
