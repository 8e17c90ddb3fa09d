"""Prints llama.cpp's logits of every position of a list of ids, as one JSON object. Through the bindings of its Python package, which
finds the library by LLAMA_CPP_LIB_PATH."""

import json
import sys

import llama_cpp


def main():
    path, threads, ids = sys.argv[1], int(sys.argv[2]), [int(id) for id in sys.argv[3].split(",")]
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = 1024, 512, 64
    parameters.n_threads = parameters.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, parameters)
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for position, id in enumerate(ids):
        batch.token[position], batch.pos[position], batch.logits[position] = id, position, True
        batch.n_seq_id[position], batch.seq_id[position][0] = 1, 0
    if llama_cpp.llama_decode(context, batch) != 0:
        sys.exit("llama_decode failed")
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    rows = [llama_cpp.llama_get_logits_ith(context, position)[:vocabulary] for position in range(len(ids))]
    print(json.dumps(dict(logits=rows)))


if __name__ == "__main__":
    main()
