#define GRANET_WIDTH 4
#define GRANET_MAX_VECTORS 5
#define GRANET_MAX_GRADIENT_VECTORS 8
#define GRANET_ISA_NAME "generic"
#include "bfloat16.inc"

const granet::Bfloat16Kernels& granet::bfloat16_generic() { return kBfloat16Table; }
