#!/usr/bin/env bash
# Sets up on first use and runs the whole recipe: build a model, stage 1, stage 2, evaluate, talk to it.
#
#   bash run.sh          built-in data and a tiny model, on whatever machine this is
#   bash run.sh test     the tests; test --all: the long ones too
#   bash run.sh help     the environment variables that choose models, data and train type for a real run
#
# A step that is done is not done again, and one that was interrupted goes on where it was.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

help() {
  cat <<'TEXT'
Environment variables of `bash run.sh` (none: the built-in recipe):

  VISION_TOWER       CLIP's folder or hub id, as openai/clip-vit-large-patch14-336
  LANGUAGE_MODEL     the language model's folder or hub id, as Qwen/Qwen1.5-4B-Chat
  MODEL              instead of both: a LLaVA folder or hub id to start from
  VERSION            chat template: own (default), v1, llava_llama_2, chatml_direct
  PRETRAIN_DATA      stage 1: captions, .json or .jsonl in LLaVA's format (none: no stage 1)
  PRETRAIN_IMAGES    stage 1: its folder of pictures, or .zip
  FINETUNE_DATA      stage 2: instructions (none: no stage 2)
  FINETUNE_IMAGES    stage 2: its folder of pictures, or .zip
  VALIDATION_DATA    rows to evaluate stage 2 on, pictures in FINETUNE_IMAGES
  TRAIN_TYPE         stage 2: freeze_vision (default), full
  PRETRAIN_ARGS      further flags of train.py for stage 1, as "--per_device_train_batch_size 8"
  FINETUNE_ARGS      further flags of train.py for stage 2
  OUT                where everything goes (out)
TEXT
}

# --- set-up ---

# An environment that has the packages is used as it is; else .venv is made, once for each requirements.txt.
setup() {
  local extra=("$@")
  if ! python3 -c "import torch, transformers, bitsandbytes, deepspeed, PIL, numpy ${extra:+, pytest, hypothesis}" 2>/dev/null; then
    if [ ! -x .venv/bin/python ]; then python3 -m venv .venv; fi
    if ! printf '%s\n' "$(cat requirements.txt)" "${extra[@]}" | cmp -s - ".venv/installed${extra:+-test}"; then
      echo "installing into .venv ..." >&2
      .venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt "${extra[@]}" >&2
      printf '%s\n' "$(cat requirements.txt)" "${extra[@]}" > ".venv/installed${extra:+-test}"
    fi
    export PATH="$PWD/.venv/bin:$PATH"
  fi
  export TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
}

# --- the recipe ---

train() {  # train OUTPUT_DIR FLAGS...: a finished run is left alone, an interrupted one goes on
  local out=$1; shift
  python train.py --output_dir "$out" --resume_from_checkpoint latest "$@"
}

real() {
  local model=${MODEL:-$OUT/model}
  if [ -z "${MODEL:-}" ] && [ ! -d "$model" ]; then
    python model.py build --vision_tower "$VISION_TOWER" --language_model "$LANGUAGE_MODEL" \
      --version "${VERSION:-own}" --out "$model"
  fi
  if [ -n "${PRETRAIN_DATA:-}" ]; then
    train "$OUT/stage1" --model_name_or_path "$model" --train_type projector --data_path "$PRETRAIN_DATA" \
      --image_folder "$PRETRAIN_IMAGES" ${PRETRAIN_ARGS:-}
    model=$OUT/stage1/final
  fi
  if [ -n "${FINETUNE_DATA:-}" ]; then
    train "$OUT/stage2" --model_name_or_path "$model" --train_type "${TRAIN_TYPE:-freeze_vision}" \
      --version "${VERSION:-own}" --data_path "$FINETUNE_DATA" --image_folder "${FINETUNE_IMAGES:-}" \
      ${VALIDATION_DATA:+--validation_data_path "$VALIDATION_DATA"} ${FINETUNE_ARGS:-}
    model=$OUT/stage2/final
  fi
  echo "the model is in $model"
}

OUT=${OUT:-out}
case "${1:-recipe}" in
  help) help ;;
  test)
    setup pytest==9.2.0 hypothesis==6.163.0
    shift
    python -m pytest -q -p no:cacheprovider test_smoke.py "$@" ;;
  recipe)
    setup
    if [ -n "${MODEL:-}${VISION_TOWER:-}" ]; then real; else builtin_recipe; fi ;;
  *) help >&2; exit 2 ;;
esac
