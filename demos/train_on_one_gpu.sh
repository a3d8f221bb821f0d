#!/usr/bin/env bash
# What is trained and measured here, in three runs of less than ten minutes each on one H100:
#
#   bash demos/train_on_one_gpu.sh teacher PICTURES.tgz OUT               emoji-unet, all the training that fits into 455 s
#   bash demos/train_on_one_gpu.sh students emoji-flux PICTURES.tgz OUT   its five students, and the ablation
#   bash demos/train_on_one_gpu.sh students emoji-unet PICTURES.tgz OUT   its five students
#
# linfusion must be importable, with the weights of the model in its demos/models. OUT gets what to keep; everything
# else goes to ./runs. Each step has a limit of its own, and what was reached by then is written.
set -o pipefail
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 # a process for each student: threads would stand in each other's way
python=${PYTHON:-python3}
spent() { echo "$1: $SECONDS s"; }

teacher() { # pictures, folder
    mkdir -p runs "$2"
    run() {
        timeout "$1" "$python" -m linfusion.demos.train_teacher --data "$DATA" --output runs/emoji-unet \
            --teacher emoji-unet "${@:2}" $MORE 2>>runs/progress
    }
    DATA=$1
    export OMP_NUM_THREADS=8
    run 500 --minutes-unet 7 --stop-after 455 --stage export | tee "$2/train.log"
    if [ ! -d runs/emoji-unet/emoji-unet ]; then
        tail -c 3000 runs/progress
        echo "again, without compilation"
        left=$((470 - SECONDS))
        [ $left -gt 100 ] && run $((left + 40)) --minutes-unet 7 --stop-after $left --stage export --no-compile |
            tee -a "$2/train.log"
    fi
    tar -cf "$2/emoji-unet.tar" -C runs/emoji-unet/emoji-unet unet scheduler model_index.json
    spent "packed"
    run $((565 - SECONDS)) --stage evaluate --guidance 3 2 5 | tee "$2/evaluate.log"
    cp runs/emoji-unet/figures.json runs/emoji-unet/*.png "$2"
    spent "measured"
}

students() { # model, pictures, folder
    mkdir -p runs "$3"
    configs=${CONFIGS:-$("$python" -c "import linfusion.distill as d; print(d.__path__[0] + '/configs')")}
    run() { # seconds, folder, configs, arguments
        timeout -k 5 "$1" "$python" -m linfusion.demos.train_students --model "$MODEL" --data_dir runs/data \
            --output_dir "runs/$2" --configs "$3" "${@:4}" $MORE 2>&1 | grep --line-buffered -v '%|\|Loading ' |
            sed -u "s/^/$2: /"
    }
    trained() { (cd "runs/$1" && ls -d */2-end_to_end/adapter | cut -d/ -f1); }
    MODEL=$1
    timeout 120 "$python" -m linfusion distill sample --model "$1" --output_dir runs/data --sample_batch_size 128 \
        --num_samples "${SAMPLES:-2048}" $SAMPLE 2>&1 | tail -n 1
    spent "sampled"
    run 330 students "$configs" --only train &
    [ "$1" = emoji-flux ] && run 330 ablation "$configs/ablation" --only train &
    wait
    (cd runs && tar -cf trained.tar */*.yaml */*.log */*/*/adapter */*/*/log.jsonl) && mv runs/trained.tar "$3"
    spent "trained"
    export OMP_NUM_THREADS=5
    left=$((560 - SECONDS))
    run $left students "$configs" $(trained students) --only measure --retrieval_data "$2" &
    run $left students "$configs" $(trained students) --only measure --retrieval_data "$2" --figures runs/sizes \
        --last_stage --scales 2 4 --num_samples 24 --batch 8 $SIZES &
    [ "$1" = emoji-flux ] && run $left ablation "$configs/ablation" $(trained ablation) --only measure \
        --retrieval_data "$2" --last_stage --num_samples 256 &
    wait
    (cd runs && tar -cf measured.tar */figures.json */table.md */sheet.png) && mv runs/measured.tar "$3"
    spent "measured"
}

"$@"
