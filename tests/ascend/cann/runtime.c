/* A stand-in for the part of CANN's runtime that torch_npu needs to start: devices, memory, streams and events on the
 * host. Device memory is host memory, and a stream does at once what it is told. build.py adds every other function
 * that torch_npu calls as one that returns an error: nothing here computes. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { OK = 0, UNSUPPORTED = 207000, OUT_OF_MEMORY = 207001, MOST_DEVICES = 16 };

static _Thread_local int32_t current = 0;
static int64_t options[8];
static char contexts[MOST_DEVICES]; /* a device's context is the address of its byte */

static uint32_t devices(void) {
    const char *wanted = getenv("STAND_IN_NPUS");
    int count = wanted ? atoi(wanted) : 1;
    return count < 1 ? 1 : count > MOST_DEVICES ? MOST_DEVICES : (uint32_t)count;
}

int aclInit(const char *config) { return OK; }
int aclFinalize(void) { return OK; }
const char *aclGetRecentErrMsg(void) { return "the stand-in for CANN computes nothing"; }
const char *aclrtGetSocName(void) { return "Ascend910B1"; }
void aclAppLog(int level, const char *function, const char *file, uint32_t line, const char *format, ...) {}

int aclrtGetDeviceCount(uint32_t *count) { return *count = devices(), OK; }
int aclrtSetDevice(int32_t device) {
    return device < 0 || (uint32_t)device >= devices() ? UNSUPPORTED : (current = device, OK);
}
int aclrtGetDevice(int32_t *device) { return *device = current, OK; }
int aclrtResetDevice(int32_t device) { return OK; }
int aclrtGetCurrentContext(void **context) { return *context = &contexts[current], OK; }
int aclrtSetCurrentContext(void *context) { return current = (int32_t)((char *)context - contexts), OK; }
int aclrtGetMemInfo(int attribute, size_t *unused, size_t *total) { return *unused = *total = (size_t)64 << 30, OK; }

int aclrtMalloc(void **memory, size_t size, int policy) {
    return posix_memalign(memory, 512, size ? size : 1) ? OUT_OF_MEMORY : OK;
}
int aclrtFree(void *memory) { return free(memory), OK; }
int aclrtMallocHost(void **memory, size_t size) { return aclrtMalloc(memory, size, 0); }
int aclrtFreeHost(void *memory) { return free(memory), OK; }
int aclrtMemcpy(void *to, size_t room, const void *from, size_t size, int kind) {
    return size > room ? UNSUPPORTED : (memmove(to, from, size), OK);
}
int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t size, int kind, void *stream) {
    return aclrtMemcpy(to, room, from, size, kind);
}
int aclrtMemset(void *memory, size_t room, int32_t value, size_t size) {
    return size > room ? UNSUPPORTED : (memset(memory, value, size), OK);
}

int aclrtCreateStream(void **stream) { return *stream = calloc(1, 8), OK; }
int aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flag) { return aclrtCreateStream(stream); }
int aclrtDestroyStream(void *stream) { return free(stream), OK; }
int aclrtSynchronizeStream(void *stream) { return OK; }
int aclrtStreamWaitEvent(void *stream, void *event) { return OK; }

int aclrtCreateEventExWithFlag(void **event, uint32_t flag) { return *event = calloc(1, sizeof(struct timespec)), OK; }
int aclrtDestroyEvent(void *event) { return free(event), OK; }
int aclrtRecordEvent(void *event, void *stream) { return clock_gettime(CLOCK_MONOTONIC, event); }
int aclrtResetEvent(void *event, void *stream) { return OK; }
int aclrtSynchronizeEvent(void *event) { return OK; }
int aclrtEventElapsedTime(float *ms, void *start, void *end) {
    const struct timespec *a = start, *b = end;
    return *ms = (b->tv_sec - a->tv_sec) * 1e3f + (b->tv_nsec - a->tv_nsec) * 1e-6f, OK;
}

/* torch_npu finds these by name when it runs. */
int aclSetCompileopt(int option, const char *value) { return OK; }
int aclrtGetSysParamOpt(int option, int64_t *value) { return *value = option < 8 ? options[option] : 0, OK; }
int aclrtSetSysParamOpt(int option, int64_t value) { return option < 8 ? (options[option] = value, OK) : OK; }
int aclrtCtxSetSysParamOpt(int option, int64_t value) { return aclrtSetSysParamOpt(option, value); }
int aclrtMallocAlign32(void **memory, size_t size, int policy) { return aclrtMalloc(memory, size, policy); }
int aclrtCreateEventWithFlag(void **event, uint32_t flag) { return aclrtCreateEventExWithFlag(event, flag); }
int aclrtSetOpExecuteTimeOut(uint32_t seconds) { return OK; }
int aclrtSetOpWaitTimeout(uint32_t seconds) { return OK; }
int aclrtSetStreamFailureMode(void *stream, uint64_t mode) { return OK; }
int aclrtSetStreamOverflowSwitch(void *stream, uint32_t flag) { return OK; }
int aclrtSetDeviceSatMode(int mode) { return OK; }
int aclrtGetPrimaryCtxState(int32_t device, uint32_t *flags, int32_t *active) { return *active = 1, OK; }
int aclrtPeekAtLastError(int level) { return OK; }
int aclrtGetLastError(int level) { return OK; }
int aclrtSynchronizeDevice(void) { return OK; }
int aclrtSynchronizeDeviceWithTimeout(int32_t timeout) { return OK; }
int aclrtSynchronizeStreamWithTimeout(void *stream, int32_t timeout) { return OK; }
int aclrtDestroyStreamForce(void *stream) { return aclrtDestroyStream(stream); }
int aclrtStreamQuery(void *stream, int *status) { return *status = 0, OK; }      /* complete */
int aclrtQueryEventStatus(void *event, int *status) { return *status = 1, OK; }  /* complete */
int aclrtQueryEventWaitStatus(void *event, int *status) { return *status = 1, OK; }
