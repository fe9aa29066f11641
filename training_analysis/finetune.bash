# Sourced by this section's launchers behind scripts/launcher.bash: `finetune` trains one model on one benchmark, then has
# the weights of the best and of the last epoch classify the test split.
home=$VLMCLASSIFIER_OUTPUTS/training_analysis
read -ra MORE <<< "${MORE:-}"

start() { # a script with its arguments, under accelerate's launcher where GPUS names several processes
    if [ "${GPUS:-1}" -gt 1 ]; then
        run "$1" -m accelerate.commands.launch --num_processes "$GPUS" "${@:2}"
    else  # one process uses one GPU
        CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0} run "$1" "${@:2}"
    fi
}

is_trained() { # a folder: weights of a training that stopped in between are not classified with
    grep -q '"finished": true' "$1/training.json" 2> /dev/null
}

finetune() { # model, benchmark, --train, then further options; NAME adds to the folder's name, WORDING is the question
    # of both scripts, ANSWER_WORDING that of the second alone
    local model=$1 benchmark=$2 train=$3 name=$1-$2-$3${NAME:+-$NAME} weights
    shift 3
    start "$name" training_analysis/finetune_vlm.py --model "$model" --benchmark "$benchmark" --train "$train" \
        --out "$home/$name" ${EPOCHS:+--epochs "$EPOCHS"} ${BATCH_SIZE:+--batch-size "$BATCH_SIZE"} \
        ${ROWS:+--limit "$ROWS"} ${WORDING:+--wording "$WORDING"} "$@" "${MORE[@]}"
    is_trained "$home/$name" || return 0
    for weights in best last; do
        [ -d "$home/$name/$weights" ] || continue
        run "$name/$weights" main_results/classify_vlm.py --model "$model" --benchmark "$benchmark" \
            --adapter "$home/$name/$weights" --out "$home/$name-$weights-answers" \
            ${ANSWER_WORDING:+--wording "$ANSWER_WORDING"} ${WORDING:+--wording "$WORDING"} "${COMMON[@]}"
    done
}
