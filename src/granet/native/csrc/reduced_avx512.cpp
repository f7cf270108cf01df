#define GRANET_WIDTH 16
#define GRANET_MAX_WORD_VECTORS 8
#define GRANET_ISA_NAME "avx512"
#include "reduced.inc"

const granet::ReducedKernels& granet::reduced_avx512() { return kReduced; }
