#!/usr/bin/env bash
#SBATCH --job-name=llava --time=24:00:00 --requeue --open-mode=append --signal=B:USR1@300
#SBATCH --nodes=1 --ntasks-per-node=1 --cpus-per-task=32 --gpus-per-node=a100:4
#
# Sets up on first use and runs the whole recipe: build a model, stage 1, stage 2, evaluate, talk to it.
#
#   bash run.sh          built-in data and a tiny model, on whatever machine this is
#   bash run.sh test     the tests; test --all: the long ones too; test --gpu: those that need a GPU
#   bash run.sh help     this text
#   sbatch run.sh        under SLURM, from this folder; sbatch's own flags, as --nodes=2, come before the lines above
#
# A step that is done is not done again, and one that was interrupted goes on where it was. SIGTERM, SIGINT and
# SIGUSR1 make the run save and end, with status 3; a job that SLURM warns with SIGUSR1 is queued again.
#
# Environment variables (none: the built-in recipe); relative paths start at this folder:
#
#   VISION_TOWER       CLIP's folder or hub id, as openai/clip-vit-large-patch14-336
#   LANGUAGE_MODEL     the language model's folder or hub id, as Qwen/Qwen1.5-4B-Chat
#   MODEL              instead of both: a LLaVA folder or hub id to start from
#   VERSION            chat template: own (default), v1, llava_llama_2, chatml_direct
#   PRETRAIN_DATA      stage 1: captions, .json or .jsonl in LLaVA's format (none: no stage 1)
#   PRETRAIN_IMAGES    stage 1: its folder of pictures, or .zip
#   FINETUNE_DATA      stage 2: instructions (none: no stage 2)
#   FINETUNE_IMAGES    stage 2: its folder of pictures, or .zip
#   VALIDATION_DATA    rows to evaluate stage 2 on, pictures in FINETUNE_IMAGES
#   TRAIN_TYPE         stage 2: freeze_vision (default), full, use_lora
#   BITS               4: with use_lora, the language model in 4 bits
#   DEEPSPEED_CONFIG   ds_zero2.json (default where there are GPUs) or ds_zero3.json; none: one process
#   NUM_GPUS           processes on a node: one for each GPU (default: all), or on a machine without GPUs
#   HOSTFILE           DeepSpeed's list of machines, lines as "node1 slots=8", reached by ssh, without SLURM
#   PRETRAIN_ARGS      further flags of train.py for stage 1, as "--per_device_train_batch_size 8"
#   FINETUNE_ARGS      further flags of train.py for stage 2
#   OUT                where everything goes (out; of the built-in recipe out/builtin)

set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}") called_from=$PWD
cd "$([ -f "$here/train.py" ] && echo "$here" || echo "$SLURM_SUBMIT_DIR")"  # sbatch runs a copy of this file

# --- set-up ---

# An environment that has the packages is used as it is; else .venv is made, once for each requirements.txt.
setup() {
  local wanted
  if ! python -c "import sys, importlib.util as u; sys.exit(not all(map(u.find_spec, sys.argv[1:])))" \
      torch transformers bitsandbytes deepspeed PIL numpy sentencepiece google.protobuf ${1:+pytest hypothesis peft accelerate} 2>/dev/null; then
    [ -x .venv/bin/pip ] || python3 -m venv .venv
    wanted=$(printf '%s\n' "$(cat requirements.txt)" "$@")
    if [ "$wanted" != "$(cat ".venv/installed-$#" 2>/dev/null)" ]; then
      echo "installing into .venv ..." >&2
      .venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt "$@" >&2
      echo "$wanted" > ".venv/installed-$#"
    fi
    export PATH="$PWD/.venv/bin:$PATH"
  fi
  export TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
}

# --- the recipe ---

# launch: the command that starts train.py on what there is, one process or one DeepSpeed launcher on each node.
choose_launch() {
  local nodes=${SLURM_NNODES:-1} hosts=${HOSTFILE:-} gpus config=${DEEPSPEED_CONFIG:-}
  gpus=${NUM_GPUS:-$(python -c "import torch; print(torch.cuda.device_count())")}
  launch=(python train.py)
  if [ -z "$config" ] && [ "$gpus" = 0 ] && [ "$nodes" = 1 ] && [ -z "$hosts" ]; then config=none; fi
  [ "$config" != none ] || return 0
  launch=(deepspeed)
  if [ "$nodes" -gt 1 ]; then
    hosts=$OUT/hostfile
    mkdir -p "$OUT"
    scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/$/ slots=$((gpus > 0 ? gpus : 1))/" > "$hosts"
    # srun starts a launcher on each node, and forgets the job's --cpus-per-task where it is not told again.
    launch=(srun --ntasks="$nodes" --ntasks-per-node=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"}
            --export=ALL --kill-on-bad-exit=1 bash -c 'exec deepspeed --node_rank "$SLURM_NODEID" "$@"' deepspeed
            --no_ssh --master_addr "$(sed 's/ .*//; q' "$hosts")")
  elif [ -n "${NUM_GPUS:-}" ] || [ "$gpus$hosts" = 0 ]; then
    launch+=(--num_gpus "$((gpus > 0 ? gpus : 1))")  # with it the launcher passes over CUDA_VISIBLE_DEVICES
  fi
  launch+=(${hosts:+--hostfile "$hosts"} --master_port "${MASTER_PORT:-$((10000 + ${SLURM_JOB_ID:-19500} % 20000))}"
           train.py --deepspeed "${config:-ds_zero2.json}")
}

caught=""  # the signal that asks us to stop
for signal in TERM INT HUP USR1; do trap "caught=$signal" "$signal"; done

# train OUTPUT_DIR FLAGS...: a finished run is left alone, an interrupted one goes on. A signal is not passed on,
# as the deepspeed launcher kills its ranks 30 seconds after one, in the middle of a save too: hence the session
# of its own, which Ctrl-C does not reach, and the file `stop`.
train() {
  local out=$1 run status=3; shift
  if [ -z "$caught" ]; then
    setsid "${launch[@]}" --output_dir "$out" --resume_from_checkpoint latest "$@" &
    run=$!
    while kill -0 "$run" 2>/dev/null; do
      [ -z "$caught" ] || touch "$out/stop" 2>/dev/null || true  # again and again: it may not look yet
      sleep 1 || true
    done
    wait "$run" && status=0 || status=$?
  fi
  [ -n "$caught" ] || [ "$status" != 0 ] || return 0
  rm -f "$out/stop"
  if [ -n "${SLURM_JOB_ID:-}" ] && [[ $caught$status = USR1[03] ]]; then scontrol requeue "$SLURM_JOB_ID"; fi
  exit "$((status > 0 ? status : 3))"
}

refuse() { echo "run.sh: $*" >&2; exit 2; }

real() {
  # A typo of stage 2 would else be noticed after stage 1.
  [[ ${TRAIN_TYPE:-full} =~ ^(freeze_vision|full|use_lora)$ ]] || refuse "TRAIN_TYPE $TRAIN_TYPE: see run.sh help"
  [[ ${BITS:-16} =~ ^(4|16)$ ]] || refuse "BITS $BITS: 4 or 16"
  local model=${MODEL:-$OUT/model} parts=${VISION_TOWER:-}+${LANGUAGE_MODEL:-}+${VERSION:-own}
  if [ -z "${MODEL:-}" ] && [ ! -d "$model" ]; then
    python build.py --vision_tower "${VISION_TOWER:?set it, or MODEL}" \
      --language_model "${LANGUAGE_MODEL:?set it, or MODEL}" --version "${VERSION:-own}" --out "$model"
    mkdir -p "$OUT" && echo "$parts" > "$OUT/model.txt"
  elif [ -z "${MODEL:-}" ] && [ "$parts" != "$(cat "$OUT/model.txt" 2>/dev/null)" ]; then
    refuse "$model is not of $parts: name another OUT"
  fi
  if [ -n "${PRETRAIN_DATA:-}" ]; then
    train "$OUT/stage1" --model_name_or_path "$model" --train_type projector --data_path "$PRETRAIN_DATA" \
      --image_folder "${PRETRAIN_IMAGES:?set it: the pictures of PRETRAIN_DATA}" ${PRETRAIN_ARGS:-}
    model=$OUT/stage1/final
  fi
  if [ -n "${FINETUNE_DATA:-}" ]; then
    train "$OUT/stage2" --model_name_or_path "$model" --train_type "${TRAIN_TYPE:-freeze_vision}" \
      --version "${VERSION:-own}" --data_path "$FINETUNE_DATA" ${FINETUNE_IMAGES:+--image_folder "$FINETUNE_IMAGES"} \
      ${VALIDATION_DATA:+--validation_data_path "$VALIDATION_DATA"} --bits "${BITS:-16}" ${FINETUNE_ARGS:-}
    model=$OUT/stage2/final
  fi
  echo "the result: $model"
}

# The language model is born today and must learn to read before it can be shown pictures, so a stage
# stands in front: rows without pictures, scenes in words. README.md says what is real and what is not.
builtin() {
  launch=(python train.py)
  local toy=$OUT/toy log=1
  [ -t 2 ] || log=50
  local common=(--image_folder "$toy/images" --dataloader_num_workers 1 --logging_steps "$log" --eval_samples 16
    --max_new_tokens 24 --save_steps 200 --save_total_limit 1 --gradient_checkpointing False)
  [ -d "$toy" ] || python toy.py data --out "$toy"
  [ -d "$OUT/model" ] || python toy.py model --out "$OUT/model"
  train "$OUT/reading" --train_type freeze_vision --model_name_or_path "$OUT/model" \
    --data_path "$toy/reading.json" --validation_data_path "$toy/reading_validation.json" \
    --per_device_train_batch_size 16 --learning_rate 3e-3 "${common[@]}"
  train "$OUT/stage1" --train_type projector --model_name_or_path "$OUT/reading/final" \
    --data_path "$toy/captions.json" --validation_data_path "$toy/captions_validation.json" \
    --per_device_train_batch_size 8 --learning_rate 2e-3 "${common[@]}"
  train "$OUT/stage2" --train_type full --model_name_or_path "$OUT/stage1/final" \
    --data_path "$toy/train.json" --validation_data_path "$toy/train_validation.json" \
    --per_device_train_batch_size 4 --learning_rate 2e-3 --mm_vision_tower_lr 5e-4 \
    --group_by_modality_length "${common[@]}"
  for rows in train_validation train_shuffled; do
    [ -d "$OUT/$rows" ] || python evaluate.py --model_name_or_path "$OUT/stage2/final" \
      --validation_data_path "$toy/$rows.json" --image_folder "$toy/images" --max_new_tokens 24 \
      --output_dir "$OUT/$rows" > /dev/null
  done
  (out=$(realpath "$OUT"); root=$PWD; cd "$called_from" && python "$root/toy.py" summary --out "$out")
}

help() {
  sed -n '/^# Sets up/,/^$/ s/^# \{0,1\}//p' run.sh  # the text above
}

given=${MODEL:-}${VISION_TOWER:-}${LANGUAGE_MODEL:-}${PRETRAIN_DATA:-}${FINETUNE_DATA:-}
if [ -n "$given" ]; then OUT=${OUT:-out}; else OUT=${OUT:-out/builtin}; fi
case "${1:-recipe}" in
  help) help ;;
  test)
    setup pytest==9.2.0 hypothesis==6.170.15 peft==0.21.2 accelerate==1.15.0
    shift
    marks="not long and not gpu"
    case "${1:-}" in
      --all) marks="not gpu"; shift ;;
      --gpu) marks=gpu; shift ;;
    esac
    python -m pytest -q -m "$marks" test_smoke.py tests "$@" ;;
  recipe)
    setup
    if [ -n "$given" ]; then choose_launch; real
    elif [ -n "${TRAIN_TYPE:-}${BITS:-}${VALIDATION_DATA:-}${PRETRAIN_IMAGES:-}${FINETUNE_IMAGES:-}" ]
    then refuse "TRAIN_TYPE, BITS and the pictures need PRETRAIN_DATA or FINETUNE_DATA"
    else builtin; fi ;;
  *) help >&2; exit 2 ;;
esac
