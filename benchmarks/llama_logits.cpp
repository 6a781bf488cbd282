// Prints what llama.cpp computes of some tokens: logits as float32 to one file, each layer's experts as int32 to
// another.
//
//     llama_logits MODEL.gguf LOGITS EXPERTS ID …
//
// EXPERTS gets, for each layer in the order in which they run, the layer, the number of experts and of tokens, and the
// experts of every token.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "ggml-backend.h"
#include "ggml.h"
#include "llama.h"

static bool keep_experts(ggml_tensor* t, bool ask, void* file) {
  int layer = 0;
  if (std::sscanf(t->name, "ffn_moe_topk-%d", &layer) != 1) return ask ? false : true;
  if (ask) return true;
  const int32_t head[] = {layer, int32_t(t->ne[0]), int32_t(t->ne[1])};
  std::vector<int32_t> rows(size_t(t->ne[0]) * t->ne[1]);
  for (int64_t i = 0; i < t->ne[1]; ++i)
    std::memcpy(&rows[i * t->ne[0]], static_cast<const char*>(t->data) + i * t->nb[1], t->ne[0] * sizeof(int32_t));
  std::fwrite(head, sizeof head, 1, static_cast<FILE*>(file));
  std::fwrite(rows.data(), sizeof(int32_t), rows.size(), static_cast<FILE*>(file));
  return true;
}

int main(int argc, char** argv) {
  if (argc < 5) return 2;
  llama_log_set(
      [](ggml_log_level level, const char* text, void*) {
        if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
      },
      nullptr);
  llama_backend_init();
  llama_model_params mp = llama_model_default_params();
  mp.n_gpu_layers = 0;
  llama_model* model = llama_model_load_from_file(argv[1], mp);
  if (!model) return 1;
  std::vector<llama_token> ids;
  for (int i = 4; i < argc; ++i) ids.push_back(std::atoi(argv[i]));
  const int n = int(ids.size()), vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
  FILE* experts = std::fopen(argv[3], "wb");
  llama_context_params cp = llama_context_default_params();
  cp.n_ctx = 64;
  cp.n_batch = cp.n_ubatch = 64;
  cp.n_threads = cp.n_threads_batch = 1;
  cp.type_k = cp.type_v = GGML_TYPE_F32;
  cp.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
  cp.cb_eval = keep_experts;
  cp.cb_eval_user_data = experts;
  llama_context* context = llama_init_from_model(model, cp);
  if (!context) return 1;
  llama_batch batch = llama_batch_init(n, 0, 1);
  batch.n_tokens = n;
  for (int i = 0; i < n; ++i) {
    batch.token[i] = ids[i];
    batch.pos[i] = i;
    batch.n_seq_id[i] = 1;
    batch.seq_id[i][0] = 0;
    batch.logits[i] = 1;
  }
  if (llama_decode(context, batch)) return 1;
  FILE* out = std::fopen(argv[2], "wb");
  for (int i = 0; i < n; ++i) std::fwrite(llama_get_logits_ith(context, i), sizeof(float), size_t(vocabulary), out);
  std::fclose(out);
  std::fclose(experts);
}
