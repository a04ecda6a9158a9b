# /// script
# dependencies = ["hf-distill"]
# ///
"""MaKD, the first half: questions by a language model, answers by a vision-language model, kept picture by picture.

accelerate launch recipes/multi_aspect_annotate.py --dataset_name ... --vlm_name OpenGVLab/InternVL3-1B-hf \\
    --llm_name Qwen/Qwen2.5-7B-Instruct --num_questions 50 --output_dir annotated

A killed run goes on where it stopped. The result is a data set of all splits with a column `aspect_probs`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from datasets import DatasetDict
from trl import TrlParser

from hf_distill.curricula.annotation import annotate, generate_questions, vlm_judge
from hf_distill.recipe import load_data
from hf_distill.teachers import LocalTextTeacher


@dataclass
class AnnotationArguments:
    dataset_name: str = field(metadata={"help": "Hub id or folder of a data set with pictures and class labels."})
    vlm_name: str = field(metadata={"help": "Hub id or folder of the vision-language model that answers."})
    output_dir: str = field(metadata={"help": "Where questions, answers and the annotated data set go."})
    llm_name: str | None = field(
        default=None, metadata={"help": "Language model that writes questions, if none are given."}
    )
    question_file: str | None = field(default=None, metadata={"help": "One question per line. Default: written anew."})
    num_questions: int = field(default=50, metadata={"help": "Questions to keep (official configuration: 50)."})
    image_column: str = field(default="image", metadata={"help": "Column with the pictures."})
    label_column: str = field(default="label", metadata={"help": "Column with the classes."})
    id_column: str | None = field(default=None, metadata={"help": "Column that names pictures. Default: their row."})
    splits: list[str] = field(default_factory=lambda: ["train"], metadata={"help": "Splits to annotate."})
    yes_token: str = field(default="Yes", metadata={"help": "The answer that counts as yes."})
    no_token: str = field(default="No", metadata={"help": "The answer that counts as no."})
    batch_size: int = field(default=16, metadata={"help": "Questions judged at once."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Load the vision-language model in 4 bit."})


def questions_of(args: AnnotationArguments, train) -> list[str]:
    """Those of the file, or of an earlier run, or new ones, which the first process writes for all."""
    path = Path(args.question_file or Path(args.output_dir) / "questions.txt")
    with PartialState().main_process_first():
        if not path.exists():
            if args.llm_name is None or args.question_file is not None:
                raise ValueError(f"no questions in {path}: write them there, one per line, or give --llm_name")
            teacher = LocalTextTeacher(args.llm_name)

            def generate(prompt: str) -> str:
                conversation = [{"role": "user", "content": prompt}]
                return teacher.generate([conversation], max_new_tokens=64 * args.num_questions, temperature=0)[0].text

            names = train.features[args.label_column].names
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(generate_questions(generate, names, len(train), args.num_questions)))
    return [line.strip() for line in path.read_text().splitlines() if line.strip()]


def main(argv: list[str] | None = None) -> None:
    (args,) = TrlParser((AnnotationArguments,)).parse_args_and_config(argv)
    data = load_data(args.dataset_name)
    questions = questions_of(args, data[args.splits[0]])
    options = {"load_in_4bit": True} if args.load_in_4bit else {}
    teacher = LocalTextTeacher(args.vlm_name, batch_size=args.batch_size, **options)
    judge = vlm_judge(teacher, yes=args.yes_token, no=args.no_token)
    owner = teacher.fingerprint() | {"yes": args.yes_token, "no": args.no_token}
    per_call = max(1, args.batch_size // len(questions))
    annotated = {
        split: annotate(
            data[split], questions, judge, Path(args.output_dir) / "answers" / split, teacher=owner,
            image_column=args.image_column, id_column=args.id_column, images_per_call=per_call,
        )
        for split in args.splits
    }  # fmt: skip
    if PartialState().is_main_process:
        DatasetDict(dict(data) | annotated).save_to_disk(Path(args.output_dir) / "data")
        (Path(args.output_dir) / "card.json").write_text(
            json.dumps({"vlm": teacher.name, "questions": questions}, indent=1)
        )
        print(f"{sum(map(len, annotated.values()))} pictures, {len(questions)} questions: {args.output_dir}/data")


if __name__ == "__main__":
    main()
