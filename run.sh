#!/usr/bin/env bash
#SBATCH --job-name=llava --time=24:00:00 --requeue --open-mode=append --signal=B:USR1@300
#SBATCH --nodes=1 --ntasks-per-node=1 --cpus-per-task=32 --gpus-per-node=a100:4

# Sets up on first use and runs the whole recipe: build a model, stage 1, stage 2; the built-in one is evaluated, too.

#   bash run.sh          built-in data and a tiny model, on whatever machine this is
#   bash run.sh test     the tests; test --all: the long ones too; test --gpu: those that need a GPU
#   bash run.sh help     this text
#   sbatch run.sh        under SLURM (cluster.md); sbatch's own flags, as --nodes=2, win over the lines above

# A step that is done is not done again, and one that was interrupted goes on where it was. SIGTERM, SIGINT, SIGHUP
# and SIGUSR1 make the run save and end, with status 3. A SLURM job that was warned of its time limit or of preemption,
# or failed after its stage had saved a checkpoint, is queued again.

# Environment variables (all unset: the built-in recipe); relative paths start at this folder:

#   VISION_TOWER       CLIP's folder or hub id, as openai/clip-vit-large-patch14-336
#   LANGUAGE_MODEL     the language model's folder or hub id, as Qwen/Qwen1.5-4B-Chat
#   MODEL              instead of both: a LLaVA folder or hub id to start from
#   VERSION            chat template: own (default), v1, llava_llama_2, chatml_direct
#   PRETRAIN_DATA      stage 1: captions, .json or .jsonl in LLaVA's format (unset: no stage 1)
#   PRETRAIN_IMAGES    stage 1: its folder of pictures, or .zip
#   FINETUNE_DATA      stage 2: instructions (unset: no stage 2)
#   FINETUNE_IMAGES    stage 2: its folder of pictures, or .zip
#   VALIDATION_DATA    rows to evaluate stage 2 on, pictures in FINETUNE_IMAGES
#   TRAIN_TYPE         stage 2: freeze_vision (default), full, use_lora
#   BITS               4: with use_lora, the language model in 4 bits
#   DEEPSPEED_CONFIG   ds_zero2.json (default of several processes) or ds_zero3.json; none: one process
#   NUM_GPUS           processes on a node: one for each GPU (default: all), or on a machine without GPUs
#   HOSTFILE           DeepSpeed's list of machines, lines as "node1 slots=8", reached by ssh, without SLURM
#   PRETRAIN_ARGS      further flags of train.py for stage 1, as "--per_device_train_batch_size 8"
#   FINETUNE_ARGS      further flags of train.py for stage 2
#   OUT                where everything goes (out; of the built-in recipe out/builtin)

set -euo pipefail
refuse() { echo "run.sh: $*" >&2; exit 2; }
here=$(dirname "${BASH_SOURCE[0]}") called_from=$PWD
[ -f "$here/train.py" ] || [ -z "${SLURM_JOB_ID:-}" ] ||  # sbatch runs a copy of this file
  here=$(dirname "$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=\(.*run\.sh\).*/\1/p' | head -n 1)")
[ -f "$here/train.py" ] || refuse "does not know its folder: sbatch /path/to/run.sh"
cd "$here"

# --- set-up ---

# Whether this python has what requirements.txt and further lines ask for: without an index pip then has no complaint.
has_packages() {
  PIP_CONFIG_FILE=/dev/null PIP_FIND_LINKS="" "$1" -m pip install --quiet --dry-run --no-index --no-deps \
    -r requirements.txt "${@:2}" &> /dev/null
}

# An environment that has the packages is used as it is; else .venv is made.
setup() {
  export TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
  if has_packages python "$@"; then return; fi
  if [ ! -x .venv/bin/pip ]; then
    python3 -c "import sys; sys.exit(sys.version_info < (3, 11))" ||
      refuse "needs Python 3.11 or newer, and python3 is $(python3 --version)"
    python3 -m venv .venv
  fi
  export PATH="$PWD/.venv/bin:$PATH"
  if has_packages python "$@"; then return; fi
  echo "installing into .venv (python lacks packages of requirements.txt, or has other versions) ..." >&2
  pip install --quiet --disable-pip-version-check -r requirements.txt "$@" >&2
}

# --- how training starts and stops ---

# Sets launch, one process or one DeepSpeed launcher on each node, and step, what starts that on SLURM's nodes.
launch=(python train.py) step=()
choose_launch() {
  local nodes=${SLURM_NNODES:-1} hosts=${HOSTFILE:-} config=${DEEPSPEED_CONFIG:-} gpus=${NUM_GPUS:-}
  # With too old a driver, GPUs are counted that are not available.
  gpus=${gpus:-$(python -c "import torch; print(torch.cuda.device_count() * torch.cuda.is_available())")}
  [[ $config != none || $nodes$hosts = 1 ]] || refuse "DEEPSPEED_CONFIG=none is one process, not one on each node"
  if [ "$config" != none ] && [[ $gpus -gt 1 || $nodes -gt 1 || -n $hosts ]]; then
    type -P deepspeed > /dev/null || refuse "many processes need deepspeed; one does not: DEEPSPEED_CONFIG=none"
    # Two runs on one machine need two ports.
    launch=(deepspeed --log_level critical --master_port "${MASTER_PORT:-$((10000 + ${SLURM_JOB_ID:-RANDOM} % 20000))}")
    if [ "$nodes" -gt 1 ]; then
      hosts=$OUT/hostfile
      mkdir -p "$OUT"
      scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/$/ slots=$((gpus > 0 ? gpus : 1))/" > "$hosts"
      launch+=(--no_ssh --master_addr "$(sed 's/ .*//; q' "$hosts")")
    fi
    # With --num_gpus or a hostfile the launcher passes over CUDA_VISIBLE_DEVICES.
    [[ -n ${NUM_GPUS:-}$hosts || ${CUDA_VISIBLE_DEVICES:-} != *[A-Za-z]* ]] ||
      refuse "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES: DeepSpeed's launcher takes numbers (nvidia-smi -L), as 0,1"
    launch+=(${NUM_GPUS:+--num_gpus "$NUM_GPUS"} ${hosts:+--hostfile "$hosts"} train.py)
    config=${config:-ds_zero2.json}
  fi
  [ "${config:-none}" = none ] || launch+=(--deepspeed "$config")
  # A batch job's run is a step, on one node too: before it preempts, SLURM sends SIGTERM to the tasks of steps alone.
  # srun forgets the job's --cpus-per-task where it is not told again.
  if [ "$nodes" -gt 1 ] || [[ -n ${SLURM_JOB_ID:-} && -z ${SLURM_STEP_ID:-} ]]; then
    step=(srun --ntasks="$nodes" --ntasks-per-node=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"}
          --export=ALL --kill-on-bad-exit=1 bash run.sh task)
  fi
}

caught=""  # the signal that asks us to stop
for signal in TERM INT HUP USR1; do trap "caught=$signal" "$signal"; done

# attend OUTPUT_DIR COMMAND...: runs it to its end, in a process group of its own, which Ctrl-C does not reach. A
# signal is not passed on, for the launcher kills its ranks 30 s after one, in a save too. It becomes the file `stop`.
attend() {
  local out=$1 run; shift
  set -m
  "$@" < /dev/null &
  run=$!
  set +m
  while kill -0 "$run" 2>/dev/null; do
    [ -z "$caught" ] || echo "$caught" 2>/dev/null > "$out/stop" || true  # often: a run that begins removes an old one
    sleep 0.5 || true
  done
  wait "$run"
}

# task OUTPUT_DIR COMMAND...: what srun starts on a node. It alone hears SLURM's SIGTERM: below it that is blocked.
# Status 3 becomes 0, since for one task that fails srun kills the others, in their saves.
task() {
  local out=$1 status=0; shift
  [ "$1" != deepspeed ] || set -- deepspeed --node_rank "$SLURM_NODEID" "${@:2}"
  attend "$out" python -c "import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
os.execvp(sys.argv[1], sys.argv[1:])" "$@" || status=$?
  exit "$((status == 3 ? 0 : status))"
}

# train OUTPUT_DIR FLAGS...: a finished run is left alone, an interrupted one goes on.
train() {
  local out=$1 status=0 before; shift
  before=$(checkpoints "$out")
  [ -n "$caught" ] || attend "$out" ${step[@]+"${step[@]}" "$out"} "${launch[@]}" --output_dir "$out" \
    --resume_from_checkpoint latest "$@" || status=$?
  if [ -z "$caught" ] && [ "$status" = 0 ] && [ -d "$out/final" ]; then return 0; fi
  if [ -z "$caught" ] && [ -s "$out/stop" ]; then caught=USR1; fi  # a task was told of preemption; this script is not
  if [ "$caught$status" = 0 ] && [ ! -e "$out/stop" ]; then status=1; fi  # a launcher that is killed says 0
  rm -f "$out/stop"
  case $caught:$status in
    USR1:[03]) requeue || how_to_go_on ;;
    *:[03]) how_to_go_on ;;
    TERM:* | INT:* | HUP:* | *:2) ;;
    *) [ "$before" = "$(checkpoints "$out")" ] || requeue || true ;;  # a node or a process has died, perhaps
  esac
  exit "$((status > 0 ? status : 3))"
}

checkpoints() { ls -d "$1"/checkpoint-* 2>/dev/null || true; }

requeue() {  # of an array's tasks this one alone
  [ ${#step[@]} -gt 0 ] &&
    scontrol requeue "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
}

how_to_go_on() {  # as the user's shell takes it
  local name command="bash run.sh" gpus=${SLURM_GPUS_PER_NODE:+ --gpus-per-node=$SLURM_GPUS_PER_NODE}
  [ ${#step[@]} = 0 ] || command="sbatch --nodes=${SLURM_NNODES:-1}$gpus run.sh"
  for name in $(usage | sed -n 's/^  \([A-Z_]*\)  .*/\1/p'); do
    [ -z "${!name:-}" ] || command=$(printf "%s=%q %s" "$name" "${!name}" "$command")
  done
  echo "run.sh: stopped; to go on: cd $(printf %q "$PWD") && $command" >&2
}

# Mistakes that would otherwise be noticed only after stage 1.
check_settings() {
  local name more=${PRETRAIN_IMAGES:-}${FINETUNE_IMAGES:-}${VALIDATION_DATA:-}${TRAIN_TYPE:-}${BITS:-}
  [ -z "$more" ] || [ -n "${PRETRAIN_DATA:-}${FINETUNE_DATA:-}${VISION_TOWER:-}" ] ||  # or only to build
    refuse "pictures, VALIDATION_DATA, TRAIN_TYPE and BITS need PRETRAIN_DATA or FINETUNE_DATA"
  for name in {PRETRAIN,FINETUNE}_{DATA,IMAGES} VALIDATION_DATA HOSTFILE; do
    [[ -z ${!name:-} || -f ${!name} || ($name = *_IMAGES && -d ${!name}) ]] || refuse "$name ${!name}: not there"
  done
  [[ ${VERSION:-own} =~ ^(own|v1|llava_llama_2|chatml_direct)$ ]] || refuse "VERSION $VERSION: see run.sh help"
  [[ ${TRAIN_TYPE:-full} =~ ^(freeze_vision|full|use_lora)$ ]] || refuse "TRAIN_TYPE $TRAIN_TYPE: see run.sh help"
  [[ ${BITS:-16} = 16 || $BITS-${TRAIN_TYPE:-} = 4-use_lora ]] || refuse "BITS $BITS: 16, or 4 with TRAIN_TYPE=use_lora"
  [ -z "${PRETRAIN_DATA:-}" ] || [ -n "${PRETRAIN_IMAGES:-}" ] || refuse "PRETRAIN_DATA needs PRETRAIN_IMAGES"
  [[ -z $given || -n ${MODEL:-} || (-n ${VISION_TOWER:-} && -n ${LANGUAGE_MODEL:-}) ]] ||
    refuse "set MODEL, or VISION_TOWER and LANGUAGE_MODEL"
}

recipe_on_data() {
  local model=${MODEL:-$OUT/model} parts=${VISION_TOWER:-}+${LANGUAGE_MODEL:-}+${VERSION:-own}
  if [ -z "${MODEL:-}" ] && [ ! -d "$model" ]; then
    python build.py --vision_tower "$VISION_TOWER" --language_model "$LANGUAGE_MODEL" --version "${VERSION:-own}" \
      --out "$model"
    mkdir -p "$OUT" && echo "$parts" > "$OUT/model.txt"
  elif [ -z "${MODEL:-}" ] && [ "$parts" != "$(cat "$OUT/model.txt" 2>/dev/null)" ]; then
    refuse "$model is not of $parts: name another OUT"
  fi
  if [ -n "${PRETRAIN_DATA:-}" ]; then
    train "$OUT/stage1" --model_name_or_path "$model" --train_type projector --data_path "$PRETRAIN_DATA" \
      --image_folder "$PRETRAIN_IMAGES" ${PRETRAIN_ARGS:-}
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
builtin_recipe() {
  local toy=$OUT/toy log=1
  [ -t 2 ] || log=50
  [ -d "$toy" ] || python toy.py data --out "$toy"
  [ -d "$OUT/model" ] || python toy.py model --out "$OUT/model"
  stage() {  # its name, what it starts from, its rows, further flags
    train "$OUT/$1" --model_name_or_path "$OUT/$2" --data_path "$toy/$3.json" --image_folder "$toy/images" \
      --validation_data_path "$toy/$3_validation.json" --eval_samples 16 --max_new_tokens 24 --save_steps 200 \
      --save_total_limit 1 --gradient_checkpointing False --dataloader_num_workers 1 --logging_steps "$log" "${@:4}"
  }
  stage reading model reading --train_type freeze_vision --per_device_train_batch_size 16 --learning_rate 3e-3
  stage stage1 reading/final captions --train_type projector --per_device_train_batch_size 8 --learning_rate 2e-3
  stage stage2 stage1/final train --train_type full --per_device_train_batch_size 4 --learning_rate 2e-3 \
    --mm_vision_tower_lr 5e-4 --group_by_modality_length
  for rows in train_validation train_shuffled; do
    [ -z "$caught" ] || { how_to_go_on; exit 3; }
    [ -d "$OUT/$rows" ] || python evaluate.py --model_name_or_path "$OUT/stage2/final" \
      --validation_data_path "$toy/$rows.json" --image_folder "$toy/images" --max_new_tokens 24 \
      --output_dir "$OUT/$rows" > /dev/null
  done
  (out=$(realpath "$OUT"); root=$PWD; cd "$called_from" && python "$root/toy.py" summary --out "$out")
}

usage() { sed -n '/^# Sets up/,/^set / { /^set /d; s/^# \{0,1\}//; p; }' run.sh; }  # the text above

given=${MODEL:-}${VISION_TOWER:-}${LANGUAGE_MODEL:-}${PRETRAIN_DATA:-}${FINETUNE_DATA:-}
if [ -n "$given" ]; then OUT=${OUT:-out}; else OUT=${OUT:-out/builtin}; fi
case "${1:-recipe}" in
  help) usage ;;
  task) shift; task "$@" ;;
  test)
    setup pytest==9.2.0 hypothesis==6.170.15 peft==0.21.2 accelerate==1.15.0 ruff==0.17.6
    shift
    marks="not long and not gpu"
    case "${1:-}" in --all) marks="not gpu"; shift ;; --gpu) marks=gpu; shift ;; esac
    python -m pytest -q -m "$marks" test_smoke.py tests "$@" ;;
  recipe)
    check_settings
    setup
    if [ -n "$given" ]; then choose_launch; recipe_on_data; else builtin_recipe; fi ;;
  *) usage >&2; exit 2 ;;
esac
