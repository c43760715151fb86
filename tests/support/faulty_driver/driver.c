/* A Vulkan driver in front of the real one, which it passes all calls on to. Environment:
 *   FAULTY_DRIVER_REAL     the library of the real driver
 *   FAULTY_DRIVER_TRIGGER  a file with a way to fail and a number, as in `lost 500`. The first process that sees it at a
 *                          submission after that many takes it away, and fails from then on: `lost` the device is gone;
 *                          `memory` there is none left to allocate
 *   FAULTY_DRIVER_GPU      the name of a GPU that this driver pretends to have
 */
#include <dlfcn.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Of the Vulkan specification, as much as is needed here. */
typedef int32_t VkResult;
typedef void (*Function)(void);
typedef Function (*GetProcAddr)(void *object, const char *name);
enum { SUCCESS = 0, OUT_OF_DEVICE_MEMORY = -2, DEVICE_LOST = -4, DISCRETE_GPU = 2 };
struct Properties {
    uint32_t api_version, driver_version, vendor, device, type;
    char name[256];
};
struct Properties2 {
    int32_t structure;
    void *next;
    struct Properties properties;
};

enum { NONE, LOST, MEMORY };
static atomic_int fault = NONE;

static void *real(const char *name) {
    static void *library;
    const char *path = getenv("FAULTY_DRIVER_REAL");
    if (!library && (!path || !(library = dlopen(path, RTLD_NOW | RTLD_LOCAL)))) {
        fprintf(stderr, "faulty driver: %s\n", path ? dlerror() : "FAULTY_DRIVER_REAL is not set");
        abort();
    }
    return dlsym(library, name);
}

static void look_for_trigger(void) {
    static atomic_long submissions;
    char mode[16];
    long after;
    const char *path = getenv("FAULTY_DRIVER_TRIGGER");
    FILE *file = path ? fopen(path, "r") : NULL;
    submissions++;
    if (!file) return;
    if (fscanf(file, "%15s %ld", mode, &after) == 2 && submissions > after && unlink(path) == 0) {
        fault = strcmp(mode, "lost") == 0 ? LOST : MEMORY;
        fprintf(stderr, "faulty driver: %s from submission %ld on\n", mode, (long)submissions);
    }
    fclose(file);
}

/* A wrapper of a function of a device or of its queue: `failure` if the fault is `mode`, else what the driver says. */
#define FAILS(name, mode, failure, parameters, arguments)   \
    static VkResult(*real_##name) parameters;               \
    static VkResult name parameters {                       \
        return fault == mode ? failure : real_##name arguments; \
    }

FAILS(vkAllocateMemory, MEMORY, OUT_OF_DEVICE_MEMORY, (void *d, const void *i, const void *a, void *m), (d, i, a, m))
FAILS(vkWaitForFences, LOST, DEVICE_LOST, (void *d, uint32_t n, const void *f, uint32_t all, uint64_t t), (d, n, f, all, t))
FAILS(vkWaitSemaphores, LOST, DEVICE_LOST, (void *d, const void *i, uint64_t t), (d, i, t))
FAILS(vkGetFenceStatus, LOST, DEVICE_LOST, (void *d, uint64_t f), (d, f))
FAILS(vkGetSemaphoreCounterValue, LOST, DEVICE_LOST, (void *d, uint64_t s, uint64_t *v), (d, s, v))
FAILS(vkQueueWaitIdle, LOST, DEVICE_LOST, (void *q), (q))
FAILS(vkDeviceWaitIdle, LOST, DEVICE_LOST, (void *d), (d))

static VkResult (*real_vkQueueSubmit)(void *, uint32_t, const void *, uint64_t);
static VkResult vkQueueSubmit(void *queue, uint32_t count, const void *submits, uint64_t fence) {
    if (fault == NONE) look_for_trigger();
    return fault == LOST ? DEVICE_LOST : real_vkQueueSubmit(queue, count, submits, fence);
}

static void pretend(struct Properties *properties) {
    const char *name = getenv("FAULTY_DRIVER_GPU");
    if (!name) return;
    properties->type = DISCRETE_GPU;
    snprintf(properties->name, sizeof properties->name, "%s", name);
}

static void (*real_vkGetPhysicalDeviceProperties)(void *, struct Properties *);
static void vkGetPhysicalDeviceProperties(void *device, struct Properties *properties) {
    real_vkGetPhysicalDeviceProperties(device, properties);
    pretend(properties);
}

static void (*real_vkGetPhysicalDeviceProperties2)(void *, struct Properties2 *);
static void vkGetPhysicalDeviceProperties2(void *device, struct Properties2 *properties) {
    real_vkGetPhysicalDeviceProperties2(device, properties);
    pretend(&properties->properties);
}

static GetProcAddr real_vkGetDeviceProcAddr;
static Function vkGetDeviceProcAddr(void *device, const char *name);

/* Extensions that have become part of Vulkan go by both names. */
#define WRAP(function)                                                                          \
    if (strcmp(name, #function) == 0 || strcmp(name, #function "KHR") == 0) {                   \
        real_##function = (void *)found;                                                        \
        return (Function)function;                                                              \
    }

static Function wrapped(const char *name, Function found) {
    if (!found) return NULL;
    WRAP(vkGetDeviceProcAddr)
    WRAP(vkGetPhysicalDeviceProperties)
    WRAP(vkGetPhysicalDeviceProperties2)
    WRAP(vkQueueSubmit)
    WRAP(vkAllocateMemory)
    WRAP(vkWaitForFences)
    WRAP(vkWaitSemaphores)
    WRAP(vkGetFenceStatus)
    WRAP(vkGetSemaphoreCounterValue)
    WRAP(vkQueueWaitIdle)
    WRAP(vkDeviceWaitIdle)
    return found;
}

static Function vkGetDeviceProcAddr(void *device, const char *name) {
    return wrapped(name, real_vkGetDeviceProcAddr(device, name));
}

/* What the loader looks for in a driver. */

VkResult vk_icdNegotiateLoaderICDInterfaceVersion(uint32_t *version) {
    return ((VkResult(*)(uint32_t *))real("vk_icdNegotiateLoaderICDInterfaceVersion"))(version);
}

Function vk_icdGetInstanceProcAddr(void *instance, const char *name) {
    return wrapped(name, ((GetProcAddr)real("vk_icdGetInstanceProcAddr"))(instance, name));
}

Function vk_icdGetPhysicalDeviceProcAddr(void *instance, const char *name) {
    return wrapped(name, ((GetProcAddr)real("vk_icdGetPhysicalDeviceProcAddr"))(instance, name));
}
