// An empty libatb.so: torch_npu's libop_plugin_atb.so, which vLLM Ascend imports, needs its names.
// The operators behind them are in npusim_vllm/ops.py.
#include "npusim.h"

#define FAILS(symbol) \
  API int symbol() { return 1; }
#define MISSING(symbol) \
  API int symbol() { npusim::missing(#symbol); }

FAILS(_ZN3atb13CreateContextEPPNS_7ContextE)
FAILS(_ZN3atb14DestroyContextEPNS_7ContextE)
FAILS(_ZN3atb16DestroyOperationEPNS_9OperationE)
MISSING(_ZN3atb5Utils13GetTensorSizeERKNS_6TensorE)
#define MISSING_OPERATION(param) \
  MISSING(_ZN3atb15CreateOperationINS_5infer##param##EEEiRKT_PPNS_9OperationE)
MISSING_OPERATION(11LinearParam)
MISSING_OPERATION(12ElewiseParam)
MISSING_OPERATION(12RmsNormParam)
MISSING_OPERATION(14GroupTopkParam)
MISSING_OPERATION(18SelfAttentionParam)
MISSING_OPERATION(19PagedAttentionParam)
MISSING_OPERATION(20ReshapeAndCacheParam)
MISSING_OPERATION(9RopeParam)
